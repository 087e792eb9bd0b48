package canonical

import "strings"

// Target is the target of a request (RFC 9112, section 3.2).
type Target struct {
	Path     string // canonical; "*" for OPTIONS of the server as a whole
	Query    string // as it was sent, without the question mark
	HasQuery bool   // there was a question mark, whatever followed it
	Host     string // canonical, of absolute-form; empty otherwise
	Scheme   string // http or https, of absolute-form; empty otherwise
}

// String returns the target in origin-form or asterisk-form: what is
// forwarded.
func (t Target) String() string {
	if !t.HasQuery {
		return t.Path
	}
	return t.Path + "?" + t.Query
}

// ParseTarget reads a target in origin-form, absolute-form (of http and
// https), or, for OPTIONS, asterisk-form. CONNECT and authority-form are
// refused: there is no path to decide on. The extended CONNECT of HTTP/2 has
// one, in place of a GET (RFC 8441, section 4): parse it as that. The error is
// an [*Error].
func ParseTarget(method, target string, o Options) (Target, error) {
	switch {
	case len(target) > MaxTarget:
		return Target{}, refuse(PartTarget, TooLong, "", 0) // the rest may be the query
	case target == "":
		return Target{}, refuse(PartTarget, Empty, "", 0)
	case method == "CONNECT":
		return Target{}, refuse(PartTarget, Form, "", 0)
	case target[0] == '/':
		return parseOrigin(target, o)
	case target == "*" && method == "OPTIONS":
		return Target{Path: "*"}, nil
	}
	return parseAbsolute(method, target, o)
}

func parseOrigin(target string, o Options) (t Target, err error) {
	path := target
	if at := strings.IndexByte(target, '?'); at >= 0 {
		path, t.Query, t.HasQuery = target[:at], target[at+1:], true
	}
	if t.Path, err = Path(path, o); err != nil {
		return Target{}, err
	}
	if err = checkQuery(t.Query); err != nil {
		return Target{}, err
	}
	return t, nil
}

// parseAbsolute reads an absolute URL. Its path may be empty, which is "/", or
// "*" for OPTIONS without a query (RFC 9112, sections 3.2.1 and 3.2.4).
func parseAbsolute(method, target string, o Options) (Target, error) {
	scheme, rest, ok := cutScheme(target)
	if !ok {
		return Target{}, refuse(PartTarget, Form, "", 0) // it may be a secret that is misplaced
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	host, err := Host(rest[:end])
	if err != nil {
		return Target{}, err
	}
	var t Target
	switch rest = rest[end:]; {
	case rest == "" && method == "OPTIONS":
		t.Path = "*"
	case rest == "":
		t.Path = "/"
	case rest[0] == '/':
		t, err = parseOrigin(rest, o)
	case rest[0] == '?':
		t = Target{Path: "/", Query: rest[1:], HasQuery: true}
		err = checkQuery(t.Query)
	default:
		err = refuse(PartTarget, Fragment, "", 0)
	}
	if err != nil {
		return Target{}, err
	}
	t.Scheme, t.Host = scheme, host
	return t, nil
}

// cutScheme cuts http:// or https:// off, in whatever case (RFC 3986, section
// 3.1).
func cutScheme(s string) (scheme, rest string, ok bool) {
	for _, scheme := range [...]string{"http", "https"} {
		n := len(scheme) + len("://")
		if len(s) >= n && lower(s[:len(scheme)]) == scheme && s[len(scheme):n] == "://" {
			return scheme, s[n:], true
		}
	}
	return "", "", false
}

// checkQuery refuses what may not stand in a request line, or would end the
// query there. Everything else is passed on as it is: clients send more than
// RFC 3986, section 3.4, allows, and rules do not look at it.
func checkQuery(s string) error {
	for i := range len(s) {
		var reason Reason
		switch b := s[i]; {
		case b < ' ' || b == 0x7f:
			reason = Control
		case b == ' ':
			reason = Space
		case b == '#':
			reason = Fragment
		case b > 0x7f:
			reason = NotASCII
		default:
			continue
		}
		return refuse(PartQuery, reason, "", 0)
	}
	return nil
}
