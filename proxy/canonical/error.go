package canonical

import (
	"fmt"
	"strconv"
	"strings"
)

// Part is what was refused.
type Part string

// The parts.
const (
	PartMethod      Part = "method"
	PartTarget      Part = "target"
	PartPath        Part = "path"
	PartQuery       Part = "query"
	PartHost        Part = "host"
	PartHeaderName  Part = "header name"
	PartHeaderValue Part = "header value"
)

// Reason is why it was refused.
type Reason uint8

// The reasons.
const (
	none Reason = iota
	TooLong
	Empty
	NotAbsolute
	Form
	BadEscape
	Control
	Space
	NotASCII
	Character
	Backslash
	Parameter
	Fragment
	QueryMark
	DotSegment
	EmptySegment
	EncodedSlash
	DoubleEncoding
	NotUTF8
	Lookalike
	TooManySegments
	Userinfo
	Zone
	Label
	Address
	Port
	SeveralHosts
	HostConflict
	NotToken
	LowerCase
	reasons // how many there are
)

// reasonWords are the code of each reason, which never changes, and what is
// wrong and to be done.
var reasonWords = [reasons]struct{ code, problem string }{
	none:            {"none", "nothing is wrong"},
	TooLong:         {"too_long", "it is too long"},
	Empty:           {"empty", "there is none"},
	NotAbsolute:     {"not_absolute", "a path begins with /"},
	Form:            {"form", "want a path, or an http or https URL; * is for OPTIONS alone, and CONNECT is not served"},
	BadEscape:       {"bad_escape", "two hexadecimal digits must follow %; write a percent sign as %25"},
	Control:         {"control", "a control character"},
	Space:           {"space", "a space; in a path or query write %20"},
	NotASCII:        {"not_ascii", "a byte that is not ASCII; percent-encode it, or use punycode for a host"},
	Character:       {"character", "a character that may not stand here; in a path percent-encode it"},
	Backslash:       {"backslash", "a backslash, which some services take for a slash; use /"},
	Parameter:       {"parameter", "a semicolon, at which some services cut the segment off; leave it out"},
	Fragment:        {"fragment", "a fragment is not sent to servers; leave out # and what follows it"},
	QueryMark:       {"query_mark", "a ? begins the query, which is not part of a path; write %3F if it is meant"},
	DotSegment:      {"dot_segment", "a . or .. segment; send the path that it leads to"},
	EmptySegment:    {"empty_segment", "an empty segment; write one slash"},
	EncodedSlash:    {"encoded_slash", "an encoded slash, at which some services split; the listener can allow it"},
	DoubleEncoding:  {"double_encoding", "encoded twice; encode once"},
	NotUTF8:         {"not_utf8", "the escaped bytes are not valid UTF-8"},
	Lookalike:       {"lookalike", "a character that Unicode normalisation turns into one of / . \\ ; %"},
	TooManySegments: {"too_many_segments", "it has too many segments"},
	Userinfo:        {"userinfo", "user information before @; leave it out"},
	Zone:            {"zone", "an IPv6 zone, which means nothing to another machine; leave it out"},
	Label:           {"label", "a label that is empty or longer than 63 bytes"},
	Address:         {"address", "not the one spelling of an IP address; write 192.0.2.1 or [2001:db8::1]"},
	Port:            {"port", "want a port from 1 to 65535, without leading zeros"},
	SeveralHosts:    {"several_hosts", "there is more than one; send one"},
	HostConflict:    {"host_conflict", "the target names another; send one host"},
	NotToken:        {"not_token", "want letters, digits and !#$%&'*+-.^_`|~ alone"},
	LowerCase:       {"lower_case", "a letter in lower case, which some services take for a capital; write methods in capitals"},
}

// String returns the code, such as dot_segment: one word, for logs and the
// labels of metrics. A code never changes its meaning.
func (r Reason) String() string {
	if r < reasons {
		return reasonWords[r].code
	}
	return "unknown"
}

// Reasons returns all of them.
func Reasons() []Reason {
	all := make([]Reason, 0, reasons-1)
	for r := none + 1; r < reasons; r++ {
		all = append(all, r)
	}
	return all
}

// Error is why a part of a request has no canonical form.
type Error struct {
	Part   Part
	Reason Reason
	// Near is what was refused from where it is wrong, quoted and clipped, in
	// printable ASCII. It is empty where that may be a secret: in queries,
	// header values and user information.
	Near string
}

// Error returns what is wrong and what to do. It is safe to print, whatever
// was refused, and has at most 256 bytes.
func (e *Error) Error() string {
	problem := "unknown reason"
	if e.Reason < reasons {
		problem = reasonWords[e.Reason].problem
	}
	if e.Near == "" {
		return fmt.Sprintf("%s: %s", e.Part, problem)
	}
	return fmt.Sprintf("%s: at %s: %s", e.Part, e.Near, problem)
}

// maxNear bounds what an error shows, in bytes before they are quoted.
const maxNear = 24

// refuse makes an error of what is wrong with s from byte at on.
func refuse(part Part, reason Reason, s string, at int) error {
	e := &Error{Part: part, Reason: reason}
	near := s[min(at, len(s)):]
	if part == PartPath {
		near, _, _ = strings.Cut(near, "?") // what follows may be a secret
		if near == "" && at < len(s) {
			near = "?"
		}
	}
	switch {
	case near == "" || part == PartQuery || part == PartHeaderValue || reason == Userinfo:
	case len(near) > maxNear:
		e.Near = strconv.QuoteToASCII(near[:maxNear]) + "..."
	default:
		e.Near = strconv.QuoteToASCII(near)
	}
	return e
}
