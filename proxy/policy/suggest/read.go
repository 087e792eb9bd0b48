package suggest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/policy"
)

// Stats is what became of the lines of an access log.
type Stats struct {
	Records int // that came to a decision
	Other   int // records that did not, such as failed handshakes
	Strange int // lines that are no records
}

// Add adds the numbers of another log.
func (s *Stats) Add(o Stats) {
	s.Records += o.Records
	s.Other += o.Other
	s.Strange += o.Strange
}

// maxLine bounds a line, in bytes; the proxy writes none that is longer.
const maxLine = 256 << 10

// The words of narthex.decision.
const (
	allowed   = "allow"
	denied    = "deny"
	wouldDeny = "would_deny"
)

// Read calls f for each record of a decision, in their order. A line that is no
// record is counted and passed over: a log may have been cut. What gzip packed
// is unpacked. The error is that of reading.
func Read(r io.Reader, f func(*telemetry.Access)) (Stats, error) {
	var stats Stats
	lines := bufio.NewReaderSize(r, 64<<10)
	if magic, _ := lines.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) { // RFC 1952, section 2.3.1
		unpacked, err := gzip.NewReader(lines)
		if err != nil {
			return stats, fmt.Errorf("read access log: %w", err)
		}
		defer unpacked.Close()
		lines = bufio.NewReaderSize(unpacked, 64<<10)
	}
	for {
		line, err := readLine(lines)
		if len(bytes.TrimSpace(line)) > 0 {
			var a telemetry.Access
			switch {
			case len(line) >= maxLine || a.UnmarshalJSON(line) != nil || a.Listener == "" || a.Action == "":
				stats.Strange++
			case a.Decision == "":
				stats.Other++
			case !slices.Contains([]string{allowed, denied, wouldDeny}, a.Decision):
				stats.Strange++
			default:
				stats.Records++
				f(&a)
			}
		}
		if errors.Is(err, io.EOF) {
			return stats, nil
		}
		if err != nil {
			return stats, fmt.Errorf("read access log: %w", err)
		}
	}
}

// readLine returns the next line, cut near maxLine.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line) < maxLine {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// Request returns what a record tells of a request, as of the time when it
// began. Headers are not logged, nor who issued the peer's certificate: what
// rules say of these cannot be told from it. The error names the field that is
// wrong, and does not show what is in it.
func Request(a *telemetry.Access) (*policy.Request, error) {
	r := &policy.Request{Listener: a.Listener, SNI: a.ServerName, Time: a.Time.Add(-a.Duration), Port: a.Port}
	switch a.Direction {
	case policy.Inbound.String():
	case policy.Outbound.String():
		r.Direction = policy.Outbound
	default:
		return nil, errors.New("narthex.direction: neither inbound nor outbound")
	}
	var err error
	switch {
	case a.Plaintext && r.Direction == policy.Outbound:
		return nil, errors.New("narthex.plaintext: at the outbound end")
	case a.Plaintext:
		r.From.Unauthenticated = true
	default:
		if r.From.ID, err = spiffeid.FromString(a.From); err != nil {
			return nil, fmt.Errorf("narthex.from: %w", err)
		}
	}
	if r.To.ID, err = spiffeid.FromString(a.To); err != nil {
		return nil, fmt.Errorf("narthex.to: %w", err)
	}
	if ap, err := netip.ParseAddrPort(a.Source); err == nil {
		r.Source = ap
	}
	if peer := &r.From; a.Serial != "" {
		if r.Direction == policy.Outbound {
			peer = &r.To
		}
		peer.Serial = a.Serial
	}
	if r.HTTP, err = requestOf(a.HTTP); err != nil {
		return nil, err
	}
	return r, nil
}

// requestOf returns the request of a record, nil for a connection. Whatever a
// listener may let pass has a form.
func requestOf(h *telemetry.AccessHTTP) (*policy.HTTP, error) {
	if h == nil {
		return nil, nil
	}
	out := &policy.HTTP{Method: h.Method, Host: h.Host, Path: h.Path, NoProof: true}
	var err error
	if h.Host != "" {
		if out.Host, err = canonical.Host(h.Host); err != nil {
			return nil, fmt.Errorf("url.domain: %w", reasonOf(err))
		}
	}
	if h.Path != asterisk {
		if out.Path, err = canonical.Path(h.Path, canonical.Options{EncodedSlash: true, EmptySegments: true}); err != nil {
			return nil, fmt.Errorf("url.path: %w", reasonOf(err))
		}
	}
	return out, nil
}

// asterisk is the path of OPTIONS * (RFC 9110, section 9.3.7).
const asterisk = "*"

// reasonOf leaves out of an error what was refused, so that many of one kind
// are one line.
func reasonOf(err error) error {
	var refused *canonical.Error
	if errors.As(err, &refused) {
		return errors.New(refused.Reason.String())
	}
	return err
}
