package http1

import (
	"bytes"
	"net/http"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// head is what requests and responses have in common.
type head struct {
	ends    []int // where each line ends, behind its line feed
	scanned int   // bytes in which line feeds were looked for

	fields       []Field
	minor        byte
	hosts        [2]string
	hostLines    int
	length       int64 // -1: none
	chunked      bool
	ended        bool // there is no body, though nothing in the fields says so
	closes       bool
	persists     bool
	options      int  // that Connection lists
	lists        bool // some of them may name fields
	upgrades     bool // Connection lists it
	upgrade      string
	protocols    int // lines of Upgrade
	expects      string
	expectations int
	te           bool // trailers are accepted
}

func (h *head) reset() {
	clear(h.fields) // views of a buffer that is another's by now
	*h = head{ends: h.ends[:0], fields: h.fields[:0], length: -1}
}

// scan finds the lines of buf. It returns the length of the head, or 0 where
// more of it is to come. It goes on where it left off.
func (h *head) scan(buf []byte, maxStart int, long error, start func([]byte) error) (int, error) {
	for {
		begin := h.lineStart()
		limit, refusal := begin+maxFieldLine, errFieldTooLong
		if begin == 0 {
			limit, refusal = maxStart, long
		}
		if limit > MaxHead {
			limit, refusal = MaxHead, errHeadTooLong
		}
		at := bytes.IndexByte(buf[h.scanned:], '\n')
		end := h.scanned + at + 1
		if at < 0 {
			h.scanned, end = len(buf), len(buf)
		}
		switch {
		case end > limit:
			return 0, refusal
		case at < 0:
			return 0, nil
		case end-begin < 2 || buf[end-2] != '\r':
			return 0, bad("bare_lf", "a line ends in a bare line feed; end it with CR LF")
		case end-begin == 2 && begin > 0:
			return end, nil
		case len(h.ends) > MaxFields:
			return 0, errTooManyFields
		}
		if begin == 0 {
			if err := start(buf[:end-2]); err != nil {
				return 0, err
			}
		}
		h.scanned = end
		h.ends = append(h.ends, end)
	}
}

func (h *head) lineStart() int {
	if len(h.ends) == 0 {
		return 0
	}
	return h.ends[len(h.ends)-1]
}

// The refusals that scan holds ready.
var (
	errRequestLine   = refuse(http.StatusRequestURITooLong, "too_long", "the request line is too long")
	errStatusLine    = bad("too_long", "the status line is too long")
	errFieldTooLong  = tooLarge("one field is too long")
	errHeadTooLong   = tooLarge("the head is too long")
	errTooManyFields = tooLarge("there are too many fields")
)

func tooLarge(problem string) error {
	return refuse(http.StatusRequestHeaderFieldsTooLarge, "too_large", problem+"; send less")
}

// readFields reads all lines but the first.
func (h *head) readFields(buf []byte) error {
	for i := 1; i < len(h.ends); i++ {
		name, value, err := splitField(buf[h.ends[i-1]:h.ends[i]-2], true)
		if err != nil {
			return err
		}
		f := Field{Name: name, Value: value}
		if err := h.note(&f); err != nil {
			return err
		}
		h.fields = append(h.fields, f)
	}
	return h.markHops()
}

// splitField reads a field line without its end. With lower it puts the name
// into lower case where it stands.
func splitField(line []byte, lower bool) (name, value string, err error) {
	if len(line) > 0 && (line[0] == ' ' || line[0] == '\t') {
		return "", "", bad("obs_fold", "a line begins with white space; send each field on one line (RFC 9112, section 5.2)")
	}
	colon := bytes.IndexByte(line, ':')
	if colon < 0 {
		return "", "", bad("no_colon", "a field line without a colon; send name: value")
	}
	if lower {
		for i, b := range line[:colon] {
			if 'A' <= b && b <= 'Z' {
				line[i] = b | 0x20
			}
		}
	}
	if name, err = canonical.HeaderName(view(line[:colon])); err != nil {
		return "", "", uncanonical(err)
	}
	if value, err = canonical.HeaderValue(view(line[colon+1:])); err != nil {
		return "", "", uncanonical(err)
	}
	return name, value, nil
}

// note takes up what a field says of the message or the connection.
func (h *head) note(f *Field) error {
	switch f.Name {
	case "host":
		if h.hostLines < len(h.hosts) {
			h.hosts[h.hostLines] = f.Value
			h.hostLines++
		}
	case "content-length":
		f.Hop = true
		return h.noteLength(f.Value)
	case "transfer-encoding":
		f.Hop = true
		return h.noteCoding(f.Value)
	case "connection":
		f.Hop = true
		return h.noteConnection(f.Value)
	case "upgrade":
		f.Hop = true
		h.upgrade = f.Value
		h.protocols++
	case "te":
		f.Hop = true
		h.te = h.te || strings.EqualFold(f.Value, "trailers")
	case "keep-alive", "proxy-connection", "close": // close is reserved (RFC 9112, section 9.6)
		f.Hop = true
	case "expect":
		f.Hop = h.minor == 0 // it means nothing there, but would in what we write (RFC 9110, section 10.1.1)
		h.expects = f.Value
		h.expectations++
	case "trailer":
		return eachToken(f.Value, checkTrailerName)
	default:
		if strings.IndexByte(f.Name, '_') >= 0 && mimics(f.Name) {
			return bad("underscore", "a name that some services take for one that frames or routes the message; write - for _")
		}
	}
	return nil
}

// noteLength reads Content-Length. Several are refused even where they are
// equal: whoever sends them means to be read by two readers.
func (h *head) noteLength(s string) error {
	switch {
	case h.length >= 0:
		return bad("several_lengths", "there is more than one Content-Length; send one")
	case s == "" || s[0] == '0' && len(s) > 1:
		return bad("bad_length", "Content-Length: want a number without leading zeros")
	}
	n := int64(0)
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return bad("bad_length", "Content-Length: want digits alone")
		}
		if i < 18 {
			n = 10*n + int64(s[i]-'0')
		}
	}
	if len(s) > 18 {
		return refuse(http.StatusRequestEntityTooLarge, "body_too_large", "Content-Length: more than 18 digits")
	}
	h.length = n
	return nil
}

func (h *head) noteCoding(s string) error {
	switch {
	case h.chunked:
		return bad("several_codings", "there is more than one Transfer-Encoding; send chunked once")
	case s == "":
		return bad("bad_coding", "Transfer-Encoding is empty; leave it out or send chunked")
	case !strings.EqualFold(s, "chunked"):
		return refuse(http.StatusNotImplemented, "coding", "Transfer-Encoding: only chunked, alone, is served")
	}
	h.chunked = true
	return nil
}

func (h *head) noteConnection(s string) error {
	return eachToken(s, func(option string) error {
		if h.options++; h.options > maxOptions {
			return bad("connection_option", "Connection lists too many options; send fewer")
		}
		switch {
		case strings.EqualFold(option, "close"):
			h.closes = true
		case strings.EqualFold(option, "keep-alive"):
			h.persists = true
		case strings.EqualFold(option, "upgrade"):
			h.upgrades = true
		case isFraming(option):
			return bad("connection_option", "Connection lists a field that frames or routes the message; leave it out there")
		default:
			h.lists = true
		}
		return nil
	})
}

// markHops marks the fields that Connection lists.
func (h *head) markHops() error {
	if !h.lists {
		return nil
	}
	for i := range h.fields {
		if h.fields[i].Name != "connection" {
			continue
		}
		err := eachToken(h.fields[i].Value, func(option string) error {
			for j := range h.fields {
				if strings.EqualFold(h.fields[j].Name, option) {
					h.fields[j].Hop = true
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// checkFraming refuses what has two ends, or another one for older readers
// (RFC 9112, sections 6.1 and 6.3).
func (h *head) checkFraming() error {
	switch {
	case h.chunked && h.length >= 0:
		return bad("length_and_coding", "Content-Length beside Transfer-Encoding; send one of them")
	case h.chunked && h.minor == 0:
		return bad("coding_in_1_0", "Transfer-Encoding in HTTP/1.0, which has none; send HTTP/1.1")
	}
	return nil
}

// keepsAlive reports whether the connection persists (RFC 9112, section 9.3).
func (h *head) keepsAlive() bool {
	return !h.closes && (h.minor == 1 || h.persists)
}

// asksUpgrade returns the one protocol that is offered or taken, or "".
func (h *head) asksUpgrade() string {
	if !h.upgrades || h.minor == 0 || h.protocols != 1 {
		return ""
	}
	if _, err := canonical.HeaderName(strings.Replace(h.upgrade, "/", "-", 1)); err != nil {
		return ""
	}
	return h.upgrade
}

// eachToken calls f for each element of a comma-separated list of tokens (RFC
// 9110, section 5.6.1). Empty elements are passed over.
func eachToken(list string, f func(string) error) error {
	for rest, more := list, true; more; {
		var element string
		element, rest, more = strings.Cut(rest, ",")
		if element = strings.Trim(element, " \t"); element == "" {
			continue
		}
		for i := range len(element) {
			if !canonical.IsToken(element[i]) {
				return bad("bad_list", "Connection or Trailer: want tokens, separated by commas")
			}
		}
		if err := f(element); err != nil {
			return err
		}
	}
	return nil
}

// parseVersion returns the minor version: only 1.0 and 1.1 are served.
func parseVersion(s string) (byte, error) {
	switch {
	case s == "HTTP/1.1":
		return 1, nil
	case s == "HTTP/1.0":
		return 0, nil
	case len(s) == len("HTTP/1.1") && s[:5] == "HTTP/" && isDigit(s[5]) && s[6] == '.' && isDigit(s[7]):
		return 0, refuse(http.StatusHTTPVersionNotSupported, "version", "only HTTP/1.0 and HTTP/1.1 are served here")
	}
	return 0, bad("bad_version", "the start line has no version; want HTTP/1.1, one space before it")
}

func isDigit(b byte) bool { return '0' <= b && b <= '9' }
