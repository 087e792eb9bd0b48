package proxyproto

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Types of TLVs (PP 2.2), and two of our own in the range that the protocol
// leaves to applications (PP 2.2.8). Of that range 0xE0 is taken by Google,
// 0xEA by Amazon and 0xEE by Microsoft.
const (
	typeALPN       = 0x01
	typeAuthority  = 0x02
	typeCRC32C     = 0x03
	typeSSL        = 0x20
	typeSSLVersion = 0x21
	typeSSLCipher  = 0x23

	// TypePeerID is the SPIFFE ID that the peer proved, as a string.
	TypePeerID = 0xE5
	// TypeOwnID is the SPIFFE ID that was presented to it.
	TypeOwnID = 0xE6

	tlvHead = 3
)

// TLV is a type and its value, at most 64 KiB less one byte.
type TLV struct {
	Type  byte
	Value []byte
}

// Authority is the server name the client asked for (PP 2.2.2).
func Authority(serverName string) TLV { return TLV{typeAuthority, []byte(serverName)} }

// ALPN is the protocol that was negotiated (PP 2.2.1).
func ALPN(protocol string) TLV { return TLV{typeALPN, []byte(protocol)} }

// PeerID is the SPIFFE ID the client proved.
func PeerID(id string) TLV { return TLV{TypePeerID, []byte(id)} }

// OwnID is the SPIFFE ID that was presented to it.
func OwnID(id string) TLV { return TLV{TypeOwnID, []byte(id)} }

// MutualTLS says that the client spoke TLS, in that version and with that
// cipher, and that its certificate was verified (PP 2.2.6). The words are
// those of OpenSSL, as in the protocol's examples.
func MutualTLS(version, cipher string) TLV {
	const (
		spokeTLS, certificateHere, certificateEarlier = 1, 2, 4
		verified                                      = 0
	)
	value := []byte{spokeTLS | certificateHere | certificateEarlier}
	value = binary.BigEndian.AppendUint32(value, verified)
	value = appendTLV(value, TLV{typeSSLVersion, []byte(version)})
	value = appendTLV(value, TLV{typeSSLCipher, []byte(cipher)})
	return TLV{typeSSL, value}
}

func appendTLV(b []byte, t TLV) []byte {
	b = append(b, t.Type)
	b = binary.BigEndian.AppendUint16(b, uint16(len(t.Value)))
	return append(b, t.Value...)
}

// AppendV1 appends the header as a line of text. Version 1 has words for TCP
// alone: a Unix socket is UNKNOWN.
func (h *Header) AppendV1(b []byte) []byte {
	source, destination, family := h.pair()
	switch family {
	case tcp4:
		b = append(b, "PROXY TCP4 "...)
	case tcp6:
		b = append(b, "PROXY TCP6 "...)
	default:
		return append(b, "PROXY UNKNOWN\r\n"...)
	}
	return fmt.Appendf(b, "%s %s %d %d\r\n", source.Addr(), destination.Addr(), source.Port(), destination.Port())
}

// AppendV2 appends the header as a block with the given TLVs. TLVs whose value
// is empty are left out. The whole must stay below 64 KiB.
func (h *Header) AppendV2(b []byte, tlvs ...TLV) []byte {
	source, destination, family := h.pair()
	start := len(b)
	b = append(b, signatureV2...)
	command := byte(commandProxy)
	if family == unspecified {
		command = commandLocal // who gets PROXY with no addresses may refuse it (PP 2.2)
	}
	b = append(b, command, family, 0, 0)
	switch family {
	case tcp4, tcp6:
		b = append(b, source.Addr().AsSlice()...)
		b = append(b, destination.Addr().AsSlice()...)
		b = binary.BigEndian.AppendUint16(b, source.Port())
		b = binary.BigEndian.AppendUint16(b, destination.Port())
	case unixStream:
		b = appendPath(b, h.SourcePath)
		b = appendPath(b, h.DestinationPath)
	}
	for _, t := range tlvs {
		if len(t.Value) > 0 {
			b = appendTLV(b, t)
		}
	}
	binary.BigEndian.PutUint16(b[start+headV2-2:], uint16(len(b)-start-headV2))
	return b
}

// pair returns the addresses in one family, which both versions want: IPv4
// beside IPv6 is written as IPv6.
func (h *Header) pair() (source, destination netip.AddrPort, family byte) {
	source, destination = h.Source, h.Destination
	switch {
	case h.Unix:
		return source, destination, unixStream
	case !source.IsValid() || !destination.IsValid():
		return source, destination, unspecified
	case source.Addr().Is4() && destination.Addr().Is4():
		return source, destination, tcp4
	}
	return mapped(source), mapped(destination), tcp6
}

// mapped returns a as IPv6 without a zone, which a header has no place for.
func mapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
}

// appendPath appends the path in its fixed space; a longer one, which no
// socket has, is cut.
func appendPath(b []byte, path string) []byte {
	var space [pathSize]byte
	copy(space[:], path)
	return append(b, space[:]...)
}
