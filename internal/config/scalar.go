package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/policy"
)

// maxSocketPath is what fits in sockaddr_un beside the final NUL (unix(7)).
const maxSocketPath = 107

// Duration is a time.Duration written as Go writes it: 300ms, 10s, 1h30m.
type Duration time.Duration

// String returns the duration as time.Duration does.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a Go duration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is no duration; write for example 300ms, 10s or 1h30m", text)
	}
	*d = Duration(v)
	return nil
}

// Address is host:port, :port or unix:/path. The zero value is no address.
type Address string

// Targets is one address or a list of them, each of which is written but once.
type Targets []Address

// maxTargets bounds a list of targets.
const maxTargets = 64

// Network returns "tcp" or "unix", as package net wants it.
func (a Address) Network() string {
	if strings.HasPrefix(string(a), "unix:") {
		return "unix"
	}
	return "tcp"
}

// Addr returns what belongs to Network: host:port, or the path of the socket.
func (a Address) Addr() string { return strings.TrimPrefix(string(a), "unix:") }

// Host returns the host of a TCP address without brackets; empty for all
// interfaces and for Unix sockets.
func (a Address) Host() string {
	if a.Network() == "unix" {
		return ""
	}
	host, _, err := net.SplitHostPort(string(a))
	if err != nil {
		return ""
	}
	return host
}

// Port returns the port of a TCP address; 0 for Unix sockets.
func (a Address) Port() uint16 {
	if a.Network() == "unix" {
		return 0
	}
	_, port, err := net.SplitHostPort(string(a))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return 0
	}
	return uint16(n)
}

// Local reports whether only this host can reach the address: a Unix socket,
// a loopback IP address or localhost.
func (a Address) Local() bool {
	if a.Network() == "unix" {
		return true
	}
	host := a.Host()
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

// UnmarshalText reads and checks an address. It does not resolve names.
func (a *Address) UnmarshalText(text []byte) error {
	s := string(text)
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if err := checkSocket(path); err != nil {
			return err
		}
		*a = Address(s)
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is no address; write host:port, [ipv6]:port or unix:/path", s)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return fmt.Errorf("%q has no port number from 0 to 65535", s)
	}
	if !validHost(host) {
		return fmt.Errorf("%q has no valid host name or IP address", s)
	}
	*a = Address(s)
	return nil
}

func validHost(host string) bool {
	if host == "" {
		return true
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	if len(host) > 253 {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(host, "."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !isAlnum(c) && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// Network is an IP network in CIDR notation, or unix for whoever has no
// address because they come over a Unix socket.
type Network string

// Unix reports whether it is unix.
func (n Network) Unix() bool { return n == "unix" }

// Prefix returns the network, or the zero value for unix.
func (n Network) Prefix() netip.Prefix {
	p, err := netip.ParsePrefix(string(n))
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// UnmarshalText reads unix, a network or an address, which is a network of
// one.
func (n *Network) UnmarshalText(text []byte) error {
	s := string(text)
	if s == "unix" {
		*n = "unix"
		return nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		s = fmt.Sprintf("%s/%d", a, a.BitLen())
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return fmt.Errorf("%q is no network; write for example 10.0.0.0/8, 192.0.2.7 or unix", clip(string(text)))
	case p.Addr().Is4In6():
		return fmt.Errorf("%q is an IPv4 network in IPv6's clothes; write it as IPv4", s)
	case p != p.Masked():
		return fmt.Errorf("%q names a host within its network; write %s, or the address alone", s, p.Masked())
	}
	*n = Network(p.String())
	return nil
}

// IDPattern is a SPIFFE ID, or a pattern of them as rules have it.
type IDPattern string

// UnmarshalText reads and checks a pattern.
func (p *IDPattern) UnmarshalText(text []byte) error {
	if _, err := policy.ParsePattern(string(text)); err != nil {
		return fmt.Errorf("%q: %w", clip(string(text)), err)
	}
	*p = IDPattern(text)
	return nil
}

// SocketMode is the permissions of a Unix socket in octal, such as 0660.
type SocketMode string

// FileMode returns the permissions; 0 where none are said.
func (m SocketMode) FileMode() fs.FileMode {
	n, err := strconv.ParseUint(string(m), 8, 9)
	if err != nil {
		return 0
	}
	return fs.FileMode(n)
}

// UnmarshalText reads and checks the permissions. Without any for its owner
// nobody could connect.
func (m *SocketMode) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 8, 9)
	if err != nil || len(text) < 3 || n&0o600 != 0o600 {
		return fmt.Errorf("%q is no mode of a socket; write for example \"0600\", \"0660\" or \"0666\"", clip(string(text)))
	}
	*m = SocketMode(text)
	return nil
}

// Socket is the absolute path of a Unix socket, at most 107 bytes.
type Socket string

// UnmarshalText reads and checks the path.
func (s *Socket) UnmarshalText(text []byte) error {
	path := string(text)
	if strings.HasPrefix(path, "unix:") {
		return fmt.Errorf("%q is an address; leave out unix: and write the path alone", path)
	}
	if err := checkSocket(path); err != nil {
		return err
	}
	*s = Socket(path)
	return nil
}

func checkSocket(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return fmt.Errorf("socket path %q is not absolute", path)
	case len(path) > maxSocketPath:
		return fmt.Errorf("socket path has %d bytes, the kernel takes at most %d; choose a shorter one", len(path), maxSocketPath)
	case strings.ContainsRune(path, 0):
		return errors.New("socket path holds a NUL byte")
	case strings.HasSuffix(path, "/"):
		return fmt.Errorf("socket path %q names a directory", path)
	}
	return nil
}

// File is the path of a file. A relative one was made relative to the
// directory of the configuration file when it was read.
type File string

// Secret is a string that is never printed. Convert it with string(s) where
// it is used.
type Secret string

// redacted stands for a secret wherever one would be printed.
const redacted = "[redacted]"

// String hides the secret.
func (Secret) String() string { return redacted }

// GoString hides the secret from %#v.
func (Secret) GoString() string { return redacted }

// MarshalText hides the secret from encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// PathLiteral is what services take literally in a path.
type PathLiteral string

// The literals.
const (
	EncodedSlash  PathLiteral = "encoded_slash"
	EmptySegments PathLiteral = "empty_segments"
)

// UnmarshalText reads one of the literals.
func (l *PathLiteral) UnmarshalText(text []byte) error {
	switch *l = PathLiteral(text); *l {
	case EncodedSlash, EmptySegments:
		return nil
	}
	return fmt.Errorf("%q: write encoded_slash or empty_segments", clip(string(text)))
}

// HTTPVersion is a version of HTTP by its ALPN protocol (RFC 7301 §6).
type HTTPVersion string

// The versions.
const (
	HTTP2 HTTPVersion = "h2"
	HTTP1 HTTPVersion = "http/1.1"
)

// UnmarshalText reads one of the versions.
func (v *HTTPVersion) UnmarshalText(text []byte) error {
	switch got := HTTPVersion(text); got {
	case HTTP2, HTTP1:
		*v = got
		return nil
	}
	return fmt.Errorf("%q: write h2 or http/1.1", clip(string(text)))
}
