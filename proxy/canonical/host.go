package canonical

import (
	"net/netip"
	"strings"
)

const (
	maxLabel = 63 // RFC 1035, section 2.3.4
	maxPort  = ":65535"
)

// Host returns the canonical form of a host, or host:port, as it stands in a
// Host field, in :authority or in an absolute-form target.
//
// Names are in lower case. Underscores may stand in them, as they do in names
// of Docker and Kubernetes. One dot at the end goes: the name is the same in
// DNS, clusters' clients write it to skip the search list, and services know
// themselves without it. Names that are not ASCII are sent in punycode.
//
// Addresses have their one spelling (RFC 5952), IPv6 in brackets, and IPv4
// never as IPv6. A name whose last label is a number must be an IPv4 address,
// as libraries read 127.1 for one.
//
// A port stays where it was given, the default one too: what the default is
// depends on a scheme that a plaintext hop changes. The error is an [*Error].
func Host(raw string) (string, error) {
	if raw == "" {
		return "", refuse(PartHost, Empty, "", 0)
	}
	if strings.IndexByte(raw, '@') >= 0 {
		return "", refuse(PartHost, Userinfo, "", 0)
	}
	if len(raw) > MaxHost+len(".")+len(maxPort) {
		return "", refuse(PartHost, TooLong, "", 0)
	}
	if raw[0] == '[' {
		return hostLiteral(raw)
	}
	end := strings.IndexByte(raw, ':')
	if end < 0 {
		end = len(raw)
	} else if strings.IndexByte(raw[end+1:], ':') >= 0 {
		return "", refuse(PartHost, Address, raw, 0)
	}
	name, port := raw[:end], raw[end:]
	if reason := checkPort(port); reason != none {
		return "", refuse(PartHost, reason, raw, end)
	}
	short := strings.TrimSuffix(name, ".")
	upper, reason, at := checkName(short)
	if reason != none {
		return "", refuse(PartHost, reason, raw, at)
	}
	if upper {
		short = lower(short)
	}
	if !isNameOrIPv4(short) {
		return "", refuse(PartHost, Address, raw, 0)
	}
	if !upper && len(short) == len(name) {
		return raw, nil
	}
	return short + port, nil
}

// checkName checks a name without the dot at its end, and reports whether
// there are capital letters in it.
func checkName(s string) (upper bool, reason Reason, at int) {
	if len(s) > MaxHost {
		return false, TooLong, MaxHost
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			if reason := rawName[s[i]]; reason != none {
				return false, reason, i
			}
			upper = upper || 'A' <= s[i] && s[i] <= 'Z'
			continue
		}
		if i == start || i-start > maxLabel {
			return false, Label, start
		}
		start = i + 1
	}
	return upper, none, 0
}

// rawName is why a byte may not stand in a label of a host name.
var rawName = func() (t [256]Reason) {
	for b := range t {
		switch {
		case isAlphanumeric(byte(b)) || b == '-' || b == '_':
		case b < ' ' || b == 0x7f:
			t[b] = Control
		case b == ' ':
			t[b] = Space
		case b > 0x7f:
			t[b] = NotASCII
		default:
			t[b] = Character
		}
	}
	return t
}()

// isNameOrIPv4 reports whether a name in lower case cannot be read as an
// address, or is the one spelling of an IPv4 address.
func isNameOrIPv4(s string) bool {
	last := s[strings.LastIndexByte(s, '.')+1:]
	digits, hex := strings.CutPrefix(last, "0x")
	for i := range len(digits) {
		if b := digits[i]; '0' > b || b > '9' && (!hex || !isHex(b)) {
			return true
		}
	}
	ip, err := netip.ParseAddr(s)
	return err == nil && ip.Is4()
}

// hostLiteral returns the canonical form of an address in brackets.
func hostLiteral(raw string) (string, error) {
	end := strings.IndexByte(raw, ']')
	if end < 0 {
		return "", refuse(PartHost, Address, raw, 0)
	}
	text, port := raw[1:end], raw[end+1:]
	if at := strings.IndexByte(text, '%'); at >= 0 {
		return "", refuse(PartHost, Zone, raw, 1+at)
	}
	if reason := checkPort(port); reason != none {
		return "", refuse(PartHost, reason, raw, end+1)
	}
	ip, err := netip.ParseAddr(text)
	if err != nil || !ip.Is6() || ip.Is4In6() {
		return "", refuse(PartHost, Address, raw, 0)
	}
	var buf [len("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]") + len(maxPort)]byte
	out := append(ip.AppendTo(append(buf[:0], '[')), ']')
	out = append(out, port...)
	if string(out) == raw {
		return raw, nil
	}
	return string(out), nil
}

// checkPort checks what follows a host: nothing, or a colon and a port.
func checkPort(s string) Reason {
	switch {
	case s == "":
		return none
	case s[0] != ':':
		return Character
	case len(s) < 2 || len(s) > len(maxPort) || s[1] == '0':
		return Port
	}
	n := 0
	for i := 1; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return Port
		}
		n = 10*n + int(s[i]-'0')
	}
	if n > 65535 {
		return Port
	}
	return none
}

// Authority returns the host a request of HTTP/1.1 is for. There must be one
// Host, and if the target is in absolute-form it must say the same (RFC 9112,
// sections 3.2 and 3.2.2). Two that are equal are refused as well: whoever
// sends them means to be read differently by two readers. The error is an
// [*Error].
func Authority(target Target, hosts []string) (string, error) {
	switch len(hosts) {
	case 0:
		return "", refuse(PartHost, Empty, "", 0)
	case 1:
	default:
		return "", refuse(PartHost, SeveralHosts, "", 0)
	}
	host, err := Host(hosts[0])
	if err != nil {
		return "", err
	}
	if target.Host != "" && target.Host != host {
		return "", refuse(PartHost, HostConflict, host, 0)
	}
	return host, nil
}
