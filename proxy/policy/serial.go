package policy

import "strings"

// serials are the revoked certificates, by hashSerial. Two authorities may
// give the same number, so a certificate is its issuer and its serial.
type serials map[uint64][]revocation

func (s serials) add(r revocation) {
	h := hashSerial(r.issuer, r.serial)
	s[h] = append(s[h], r)
}

// find returns the revocation of the peer's certificate, nil if there is none.
func (s serials) find(p *Peer) *revocation {
	if p.Issuer == "" || p.Serial == "" {
		return nil
	}
	found := s[hashSerial(p.Issuer, p.Serial)]
	for i := range found {
		if equalHex(found[i].issuer, p.Issuer) && equalHex(found[i].serial, p.Serial) {
			return &found[i]
		}
	}
	return nil
}

// normalHex returns a hexadecimal number as big.Int.Text(16) writes it: in
// lower case, without 0x, colons, white space or leading zeros. It reports
// whether s is one.
func normalHex(s string) (string, bool) {
	s = strings.ToLower(strings.TrimSpace(s))
	for _, lead := range []string{"0x", "serial=", "keyid:"} { // as openssl prints it
		s = strings.TrimPrefix(s, lead)
	}
	if s == "" || len(s) > maxIDLength {
		return "", false
	}
	out := make([]byte, 0, len(s))
	for i := range len(s) {
		switch c := s[i]; {
		case c == ':' && i > 0 && i < len(s)-1 && s[i-1] != ':':
		case c >= '0' && c <= '9', c >= 'a' && c <= 'f':
			out = append(out, c)
		default:
			return "", false
		}
	}
	if trimmed := strings.TrimLeft(string(out), "0"); trimmed != "" {
		return trimmed, true
	}
	return "0", true
}

// nextHex returns the first digit of s that counts, in lower case, and what
// follows it; 0 at the end.
func nextHex(s string, started bool) (digit byte, rest string) {
	for i := range len(s) {
		c := s[i]
		if c == ':' || c == '0' && !started && i < len(s)-1 {
			continue
		}
		if c >= 'A' && c <= 'F' {
			c += 'a' - 'A'
		}
		return c, s[i+1:]
	}
	return 0, ""
}

// hashSerial is FNV-1a over the digits that count.
func hashSerial(issuer, serial string) uint64 {
	h := uint64(14695981039346656037)
	for _, s := range [2]string{issuer, serial} {
		started := false
		for s != "" {
			var c byte
			c, s = nextHex(s, started)
			h, started = (h^uint64(c))*1099511628211, true
		}
		h = (h ^ '/') * 1099511628211
	}
	return h
}

// equalHex compares a normalised number with one in any form.
func equalHex(normal, s string) bool {
	for i := range len(normal) {
		var c byte
		c, s = nextHex(s, i > 0)
		if c != normal[i] {
			return false
		}
	}
	c, _ := nextHex(s, true)
	return c == 0
}
