package http1

import (
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Names is a set of names of fields, each with all spellings that a service
// may take for it: in any case, and with another byte for -, as CGI makes one of
// all that are neither letters nor digits. The nil set is empty.
type Names struct {
	names   map[string]struct{}
	lengths [canonical.MaxHeaderName + 1]bool // that a name has: most fields need no look at the map
}

// NewNames returns the set of these names. The error is a [*canonical.Error].
func NewNames(names ...string) (*Names, error) {
	set := &Names{names: make(map[string]struct{}, len(names))}
	for _, name := range names {
		lower, err := canonical.HeaderName(name)
		if err != nil {
			return nil, err
		}
		set.names[string(dashed(nil, lower))] = struct{}{}
		set.lengths[len(lower)] = true
	}
	return set, nil
}

// Has reports whether a name in lower case is a spelling of one of them.
func (n *Names) Has(name string) bool {
	if n == nil || len(name) >= len(n.lengths) || !n.lengths[len(name)] {
		return false
	}
	if isDashed(name) {
		_, ok := n.names[name]
		return ok
	}
	var buf [canonical.MaxHeaderName]byte
	_, ok := n.names[string(dashed(buf[:0], name))]
	return ok
}

// dashed appends a name with - for all that is neither a letter nor a digit.
func dashed(dst []byte, name string) []byte {
	for i := range len(name) {
		if isAlphanumeric(name[i]) {
			dst = append(dst, name[i])
		} else {
			dst = append(dst, '-')
		}
	}
	return dst
}

// isDashed reports whether dashed would change nothing.
func isDashed(name string) bool {
	for i := range len(name) {
		if name[i] != '-' && !isAlphanumeric(name[i]) {
			return false
		}
	}
	return true
}

func isAlphanumeric(b byte) bool { return 'a' <= b && b <= 'z' || '0' <= b && b <= '9' }

// sameName reports whether two names in lower case are spellings of one.
func sameName(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i] != b[i] && (isAlphanumeric(a[i]) || isAlphanumeric(b[i])) {
			return false
		}
	}
	return true
}

// framing are the names that say where a message ends or whom it is for.
var framing = [...]string{"host", "content-length", "transfer-encoding", "connection", "trailer"}

// isFraming reports whether a name, in any case, is one of them.
func isFraming(name string) bool {
	for _, f := range framing {
		if strings.EqualFold(f, name) {
			return true
		}
	}
	return false
}

// mimics reports whether a name in lower case is another spelling of one of
// them.
func mimics(name string) bool {
	for _, f := range framing {
		if f != name && sameName(f, name) {
			return true
		}
	}
	return false
}

// notInTrailers are the fields that are read before a body, and must not be
// changed behind it (RFC 9110, section 6.5.1): framing, routing, conditions,
// credentials, and what the body is.
var notInTrailers = func() map[string]bool {
	names := strings.Fields(`
		host content-length transfer-encoding connection trailer te upgrade keep-alive
		cache-control expect max-forwards pragma range if-match if-none-match if-modified-since
		if-unmodified-since if-range age date expires location retry-after vary warning forwarded
		authorization proxy-authorization proxy-authenticate www-authenticate proxy-connection
		authentication-info proxy-authentication-info cookie set-cookie origin
		content-encoding content-type content-range content-location content-disposition
		x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip`)
	set := make(map[string]bool, len(names))
	for _, name := range names {
		set[name] = true
	}
	return set
}()

// checkTrailerName checks the name of a trailer, in any case and spelling.
func checkTrailerName(name string) error {
	if notInTrailers[strings.ReplaceAll(strings.ToLower(name), "_", "-")] {
		return bad("trailer", "a field that may not come behind the body; send it before")
	}
	return nil
}
