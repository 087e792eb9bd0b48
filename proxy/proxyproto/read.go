package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// Read takes one header from r, and not a byte of what follows it. The first
// byte that belongs to no header ends it.
//
// The error is io.EOF when r ended before its first byte, and wraps
// io.ErrUnexpectedEOF when it ended within a header, ErrNone when what came is
// none, or r's own error. Read never takes more than MaxSize bytes, and does
// not bound the time: r does.
func Read(r io.Reader) (Header, error) {
	head := make([]byte, 0, maxV1)
	for len(head) < minV1 {
		got, err := r.Read(head[len(head):minV1])
		head = head[:len(head)+got]
		if n := len(head); !begins(head, signatureV1) && !begins(head, signatureV2) {
			what := ""
			if n > 1 && head[0] == 0x16 && head[1] == 3 { // a handshake record
				what = ", as TLS begins"
			}
			return Header{}, fmt.Errorf("%w: the first bytes are %x%s", ErrNone, head[:min(n, 8)], what)
		}
		if len(head) < minV1 && err != nil {
			return Header{}, cutShort(err, len(head))
		}
	}
	if head[0] == signatureV1[0] {
		return readV1(r, head)
	}
	return readV2(r, head)
}

// begins reports whether b and the signature agree as far as both go.
func begins(b []byte, signature string) bool {
	n := min(len(b), len(signature))
	return string(b[:n]) == signature[:n]
}

func cutShort(err error, read int) error {
	switch {
	case !errors.Is(err, io.EOF):
		return err
	case read == 0:
		return io.EOF
	}
	return fmt.Errorf("the PROXY header ends after %d bytes: %w", read, io.ErrUnexpectedEOF)
}

// more reads n bytes behind those that are in b already.
func more(r io.Reader, b []byte, n int) ([]byte, error) {
	at := len(b)
	b = append(b, make([]byte, n)...)
	got, err := io.ReadFull(r, b[at:])
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = io.EOF
		}
		return nil, cutShort(err, at+got)
	}
	return b, nil
}

// readV1 reads a line (PP 2.1). Where it ends is not known before: what it has
// less than the shortest one is read byte by byte, so that nothing behind it
// is taken.
func readV1(r io.Reader, line []byte) (Header, error) {
	for line[len(line)-1] != '\n' {
		if len(line) == maxV1 {
			return Header{}, fmt.Errorf("PROXY v1: no line end within %d bytes", maxV1)
		}
		var err error
		if line, err = more(r, line, 1); err != nil {
			return Header{}, err
		}
	}
	h, err := parseV1(line)
	if err != nil {
		return Header{}, fmt.Errorf("PROXY v1: %w", err)
	}
	return h, nil
}

func parseV1(line []byte) (Header, error) {
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok || strings.ContainsAny(text, "\r\n") {
		return Header{}, errors.New("the line does not end with CR LF")
	}
	words := strings.Split(text, " ")
	family := words[1] // the signature ends with a space
	if family == "UNKNOWN" {
		return Header{}, nil // whatever follows it (PP 2.1)
	}
	if family != "TCP4" && family != "TCP6" {
		return Header{}, fmt.Errorf("%q is neither TCP4, TCP6 nor UNKNOWN", family)
	}
	if len(words) != 6 {
		return Header{}, fmt.Errorf("want family, two addresses and two ports, got %d words", len(words)-1)
	}
	source, err := addrPortV1(family, words[2], words[4])
	if err != nil {
		return Header{}, fmt.Errorf("source: %w", err)
	}
	destination, err := addrPortV1(family, words[3], words[5])
	if err != nil {
		return Header{}, fmt.Errorf("destination: %w", err)
	}
	h := Header{Source: source, Destination: destination}
	return h, checkAddresses(h)
}

func addrPortV1(family, address, port string) (netip.AddrPort, error) {
	ip, err := netip.ParseAddr(address)
	if err != nil || ip.Zone() != "" || ip.Is4() != (family == "TCP4") {
		return netip.AddrPort{}, fmt.Errorf("%q is no address of %s", address, family)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || strconv.FormatUint(n, 10) != port { // no sign, no leading zero
		return netip.AddrPort{}, fmt.Errorf("%q is no port", port)
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), nil
}

// readV2 reads a block (PP 2.2), of which the head says how long it is.
func readV2(r io.Reader, b []byte) (Header, error) {
	b, err := more(r, b, headV2-len(b))
	if err != nil {
		return Header{}, err
	}
	size := int(binary.BigEndian.Uint16(b[14:]))
	if headV2+size > MaxSize {
		return Header{}, fmt.Errorf("PROXY v2: a header of %d bytes, more than the %d that are read", headV2+size, MaxSize)
	}
	if b, err = more(r, b, size); err != nil {
		return Header{}, err
	}
	h, err := parseV2(b)
	if err != nil {
		return Header{}, fmt.Errorf("PROXY v2: %w", err)
	}
	return h, nil
}

func parseV2(b []byte) (Header, error) {
	command, family, body := b[12], b[13], b[headV2:]
	if command == commandLocal {
		return Header{}, nil // its block is skipped, the family included (PP 2.2)
	}
	if command != commandProxy {
		return Header{}, fmt.Errorf("version and command %#02x: want %#02x or %#02x", command, commandLocal, commandProxy)
	}
	size := map[byte]int{unspecified: 0, tcp4: sizeIPv4, tcp6: sizeIPv6, unixStream: sizeUnix}
	n, ok := size[family]
	switch {
	case !ok:
		return Header{}, fmt.Errorf("family and transport %#02x: no stream of IPv4, IPv6 or Unix sockets", family)
	case len(body) < n:
		return Header{}, fmt.Errorf("%d bytes are too few for the addresses, which take %d", len(body), n)
	}
	var h Header
	switch family {
	case tcp4, tcp6:
		h.Source, h.Destination = addressesV2(body[:n])
	case unixStream:
		h.Unix, h.SourcePath, h.DestinationPath = true, pathOf(body[:pathSize]), pathOf(body[pathSize:n])
	}
	if err := checkTLVs(b, headV2+n); err != nil {
		return Header{}, err
	}
	return h, checkAddresses(h)
}

// addressesV2 reads two addresses and two ports.
func addressesV2(b []byte) (source, destination netip.AddrPort) {
	n := (len(b) - 4) / 2
	from, _ := netip.AddrFromSlice(b[:n])
	to, _ := netip.AddrFromSlice(b[n : 2*n])
	ports := b[2*n:]
	return netip.AddrPortFrom(from.Unmap(), binary.BigEndian.Uint16(ports)),
		netip.AddrPortFrom(to.Unmap(), binary.BigEndian.Uint16(ports[2:]))
}

func pathOf(b []byte) string {
	path, _, _ := bytes.Cut(b, []byte{0})
	return string(path)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkTLVs sees to it that the TLVs of header b, which begin at that offset,
// fill it, and that a checksum among them is right (PP 2.2.4). None of the
// others is believed: who we talk to, TLS says.
func checkTLVs(b []byte, at int) error {
	sum := 0 // where the checksum stands
	for at < len(b) {
		if len(b)-at < tlvHead {
			return fmt.Errorf("the last %d bytes are no TLV", len(b)-at)
		}
		kind, size := b[at], int(binary.BigEndian.Uint16(b[at+1:]))
		at += tlvHead
		if size > len(b)-at {
			return fmt.Errorf("TLV %#02x of %d bytes, of which %d are there", kind, size, len(b)-at)
		}
		if kind == typeCRC32C {
			if size != crc32.Size || sum != 0 {
				return errors.New("want one checksum of 4 bytes")
			}
			sum = at
		}
		at += size
	}
	if sum == 0 {
		return nil
	}
	said := binary.BigEndian.Uint32(b[sum:])
	blank := bytes.Clone(b)
	clear(blank[sum : sum+crc32.Size]) // it is computed with zeros in its own place
	if crc32.Checksum(blank, castagnoli) != said {
		return errors.New("the checksum is wrong: the header was damaged on its way")
	}
	return nil
}
