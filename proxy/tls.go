package proxy

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/narthex-id/narthex/proxy/policy"
)

// cipherSuites are those of TLS 1.2 that are forward secret and
// authenticated (RFC 9325 §4.2). TLS 1.3 has no others.
var cipherSuites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// session is the immutable TLS configuration for one identity and the bundles
// of the same moment.
//
// The peer is verified in VerifyConnection, which crypto/tls calls for every
// handshake. VerifyPeerCertificate is not called for a resumed session, so
// whoever authorizes there is bypassed by resumption. There are no tickets
// and no session cache either: every connection proves its identity afresh.
type session struct {
	identity *identity.Identity
	trust    *identity.Trust
	settings *settings
	config   *tls.Config
	toTarget [offers]map[string]*tls.Config // outbound, of HTTP: for each target, with its server name if it has one
	byTarget map[string]*tls.Config         // outbound: with the server name of each target that has one
}

// newSession makes the configuration. Outbound, expect is part of the
// handshake: a peer that is not expected does not see our certificate in TLS
// 1.3. Inbound, the policy decides after it.
func newSession(id *identity.Identity, trust *identity.Trust, s *settings) *session {
	c := &tls.Config{
		Certificates:                []tls.Certificate{id.Certificate},
		MinVersion:                  tls.VersionTLS12,
		CipherSuites:                cipherSuites,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // a proxy's throughput is worth more than the first byte's latency
	}
	if s.Direction == policy.Inbound {
		c.ClientAuth = tls.RequireAnyClientCert
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			_, err := trust.Verify(cs.PeerCertificates, time.Now())
			return err
		}
		s.negotiate(c)
		return &session{identity: id, trust: trust, settings: s, config: c}
	}
	c.NextProtos = s.ALPN
	c.InsecureSkipVerify = true // of the host name, which proves nothing in SPIFFE; VerifyConnection verifies the identity
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		peer, err := trust.Verify(cs.PeerCertificates, time.Now())
		if err != nil {
			return err
		}
		if !expected(s.Expect, peer) {
			return &identity.PeerError{ID: peer, Result: "unexpected", Err: fmt.Errorf("valid, but not who `expect` names: %s", someOf(s.Expect))}
		}
		return nil
	}
	byTarget := map[string]*tls.Config{}
	for _, target := range s.Targets {
		if name := cmp.Or(s.ServerName, serverNameOf(target)); name != "" {
			byTarget[target] = c.Clone()
			byTarget[target].ServerName = name
		}
	}
	made := &session{identity: id, trust: trust, settings: s, config: c, byTarget: byTarget}
	if s.HTTP != nil {
		made.offer()
	}
	return made
}

// offer is which versions of HTTP a far end may choose from.
type offer int

const (
	offersHTTP1 offer = iota
	offersHTTP2
	offersBoth
	offers
)

var offered = [offers][]string{offersHTTP1: {protocolHTTP}, offersHTTP2: {protocolH2}, offersBoth: {protocolH2, protocolHTTP}}

// offer makes the configurations of each offer.
func (s *session) offer() {
	for n := range offers {
		s.toTarget[n] = map[string]*tls.Config{}
		for _, target := range s.settings.Targets {
			c := s.toward(target).Clone()
			c.NextProtos = offered[n]
			s.toTarget[n][target] = c
		}
	}
}

// offering returns the configuration to dial target with for requests.
func (s *session) offering(target string, o offer) *tls.Config {
	if c := s.toTarget[o][target]; c != nil {
		return c
	}
	c := s.toward(target).Clone() // cannot happen: who dials has one of these
	c.NextProtos = offered[o]
	return c
}

// toward returns the configuration to dial target with: what it sends as SNI,
// if the listener does not say, is the host of the target that was chosen.
func (s *session) toward(target string) *tls.Config {
	if c := s.byTarget[target]; c != nil {
		return c
	}
	return s.config
}

// serverNameOf returns the SNI to send to target: its host when that is a
// DNS name. RFC 6066 §3 allows no IP address there.
func serverNameOf(target string) string {
	if strings.HasPrefix(target, unixPrefix) {
		return ""
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil || net.ParseIP(strings.SplitN(host, "%", 2)[0]) != nil {
		return ""
	}
	return strings.TrimSuffix(host, ".")
}

// peerOf reads the peer of a finished handshake, which VerifyConnection has
// verified.
func peerOf(cs *tls.ConnectionState) (policy.Peer, error) {
	leaf := cs.PeerCertificates[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return policy.Peer{}, fmt.Errorf("read the peer's SPIFFE ID: %w", err)
	}
	return policy.PeerOf(id, leaf), nil
}

// explainHandshake turns the error of a failed handshake into one word for
// the metrics and a reason for a person. Inbound, the far end is a client,
// outbound it is the target.
func explainHandshake(err error, direction policy.Direction) (result, reason string) {
	var peer *identity.PeerError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &peer):
		return peer.Result, peer.Error()
	case errors.As(err, &record) && direction == policy.Outbound:
		return "not_tls", "the target is no TLS server: it answered with " + firstAnswer(record.RecordHeader) + "; an outbound listener's target must be one that speaks mTLS"
	case errors.As(err, &record):
		return "not_tls", "not a TLS client: " + firstBytes(record.RecordHeader)
	case refusesUs(err):
		return "peer_alert", "the peer ended the handshake: " + explainAlert(err)
	case strings.Contains(err.Error(), "didn't provide a certificate"): // crypto/tls has no type for it
		return "no_certificate", "the client sent no certificate"
	case strings.Contains(err.Error(), "unsupported application protocols"):
		return "no_protocol", "the client " + strings.TrimPrefix(err.Error(), "tls: client ") + ", and no other: add it to `alpn`, of the listener or a route"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		if direction == policy.Outbound {
			return "closed", "the target closed the connection during the handshake: does it speak mTLS?"
		}
		return "closed", "the peer closed the connection during the handshake"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout", "the handshake took too long"
	}
	return "error", "TLS handshake: " + strings.TrimPrefix(err.Error(), "tls: ")
}

// refusesUs reports whether err is a TLS alert from the far end. In TLS 1.3 a
// client's handshake is over before the server has looked at its certificate
// (RFC 8446 §4.4.4), so that an alert can come where data is awaited.
func refusesUs(err error) bool {
	var alert *net.OpError
	return errors.As(err, &alert) && alert.Op == "remote error" // crypto/tls keeps the alert's type to itself
}

// explainAlert says what an alert that refusesUs says.
func explainAlert(err error) string {
	var alert *net.OpError
	if !errors.As(err, &alert) {
		return err.Error()
	}
	return strings.TrimPrefix(alert.Err.Error(), "tls: ")
}

// firstBytes guesses what a client that does not speak TLS speaks.
func firstBytes(b [5]byte) string {
	for _, method := range []string{"GET ", "POST ", "PUT ", "HEAD ", "DELET", "OPTIO", "PATCH", "CONNE", "TRACE", "PRI *"} {
		if strings.HasPrefix(string(b[:]), method) {
			return "it speaks plain HTTP; this port speaks TLS"
		}
	}
	return fmt.Sprintf("its first bytes are %x", b)
}

// firstAnswer guesses what a target that does not speak TLS speaks.
func firstAnswer(b [5]byte) string {
	if string(b[:]) == "HTTP/" {
		return "plain HTTP"
	}
	for _, c := range b {
		if c < ' ' || c > '~' {
			return fmt.Sprintf("the bytes %x", b)
		}
	}
	return fmt.Sprintf("%q", b[:])
}

// someOf names the first few of patterns.
func someOf(patterns []policy.Pattern) string {
	const most = 3
	words := make([]string, 0, most)
	for _, p := range patterns[:min(most, len(patterns))] {
		words = append(words, p.String())
	}
	if more := len(patterns) - most; more > 0 {
		return fmt.Sprintf("%s or %d more", strings.Join(words, ", "), more)
	}
	return strings.Join(words, " or ")
}

func versionName(v uint16) string {
	switch v {
	case 0:
		return ""
	case tls.VersionTLS12:
		return "1.2"
	case tls.VersionTLS13:
		return "1.3"
	}
	return tls.VersionName(v)
}

func cipherName(c uint16) string {
	if c == 0 {
		return ""
	}
	return tls.CipherSuiteName(c)
}
