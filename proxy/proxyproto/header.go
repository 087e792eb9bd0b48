// Package proxyproto reads and writes the header of the PROXY protocol,
// versions 1 and 2: what a proxy puts before the bytes of a connection to say
// whose connection it is.
//
//	h, err := proxyproto.Read(conn)       // takes exactly the header
//	b := h.AppendV2(nil, proxyproto.SPIFFEID(peer))
//
// Whose word is taken for an address is not decided here: who reads a header
// trusts whoever sent it.
//
// The protocol: https://www.haproxy.org/download/3.4/doc/proxy-protocol.txt,
// cited as PP with its sections.
package proxyproto

import (
	"errors"
	"fmt"
	"net/netip"
)

// Version is the version of a header to send, or Off for none.
type Version int

// The versions.
const (
	Off Version = iota
	V1          // a line of text: addresses alone
	V2          // binary: addresses, and what TLS found out
)

var versionWords = [...]string{Off: "off", V1: "v1", V2: "v2"}

// String returns the word configuration files use.
func (v Version) String() string { return versionWords[v] }

// UnmarshalText reads off, v1 or v2.
func (v *Version) UnmarshalText(text []byte) error {
	for n, word := range versionWords {
		if word == string(text) {
			*v = Version(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want off, v1 or v2", text)
}

// Header says between which two ends a connection was made, before proxies
// came between. Its zero value says nothing: the connection is the sender's
// own, or the sender does not know (LOCAL, UNKNOWN).
type Header struct {
	Source, Destination netip.AddrPort // both, of TCP, or neither; IPv4 never as IPv6

	// Unix is a connection over a Unix socket, of those paths. The path of a
	// socket without a name, which a client's usually is, is empty.
	Unix                        bool
	SourcePath, DestinationPath string
}

// MaxSize bounds a header in bytes, its TLVs included. The protocol would
// allow 64 KiB (PP 2.2); the largest that proxies are known to send holds a
// client's certificate of one or two.
const MaxSize = 8 << 10

// The layout of both versions (PP 2.1, 2.2).
const (
	signatureV1 = "PROXY "
	signatureV2 = "\r\n\r\n\x00\r\nQUIT\n"
	minV1       = len("PROXY UNKNOWN\r\n")
	maxV1       = 107
	headV2      = 16 // signature, command, family, length
	sizeIPv4    = 4 + 4 + 2 + 2
	sizeIPv6    = 16 + 16 + 2 + 2
	pathSize    = 108
	sizeUnix    = 2 * pathSize

	commandLocal = 0x20
	commandProxy = 0x21
	unspecified  = 0x00
	tcp4         = 0x11
	tcp6         = 0x21
	unixStream   = 0x31
)

// ErrNone is wrapped by the error of Read when what came is no header of
// either version.
var ErrNone = errors.New("no PROXY header")

// checkAddresses refuses addresses no connection can have.
func checkAddresses(h Header) error {
	for _, a := range []netip.AddrPort{h.Source, h.Destination} {
		if ip := a.Addr(); ip.IsUnspecified() || ip.IsMulticast() {
			return fmt.Errorf("%s is no address of one host", ip)
		}
	}
	return nil
}
