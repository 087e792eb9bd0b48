package upstream

import (
	"errors"
	"fmt"
	"time"
)

// Settings say how targets are chosen and watched. The zero value is round
// robin, no active checks and the default ejection. Values can be compared.
type Settings struct {
	Balance  Balance
	Health   Health
	Ejection Ejection

	// Protocol is the borrower's word for what it speaks to the targets. A target
	// that is spoken to otherwise is another one: what failed in one protocol may
	// serve in the other, and whether its connections can be shared is not known. A
	// listener's is its UpstreamProtocol, whatever stands here.
	Protocol string

	// Of what Borrow lends; zeros are the defaults.
	MaxIdle        int           // idle connections of an endpoint that are kept: 256; negative: none
	IdleTimeout    time.Duration // how long at most, to the second: 60s
	MaxRequests    int           // loans of an endpoint at a time: any number
	MaxConnections int           // connections of an endpoint at a time, idle ones included, a shared one once: any number
	MaxPending     int           // borrowers that wait for room at a time: 1024; negative: none
	RetryPercent   int           // retries for a hundred requests, at most 100 (see Budget): 20; negative: none
}

// limits are the settings that an endpoint keeps.
type limits struct {
	idle, requests, connections int
	idleTimeout                 time.Duration
}

// Balance is how a healthy endpoint is chosen.
type Balance int

// The balances.
const (
	RoundRobin       Balance = iota // one after the other
	LeastConnections                // the one with the fewest connections from here, idle ones included
	LeastRequests                   // the one with the fewest loans from here
)

var balanceWords = [...]string{RoundRobin: "round_robin", LeastConnections: "least_connections", LeastRequests: "least_requests"}

// String returns the word configuration files use.
func (b Balance) String() string { return balanceWords[b] }

// UnmarshalText reads round_robin, least_connections or least_requests.
func (b *Balance) UnmarshalText(text []byte) error {
	for n, word := range balanceWords {
		if word == string(text) {
			*b = Balance(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want round_robin, least_connections or least_requests", text)
}

// Health is active: every endpoint is connected to now and then, and asked for
// Path, or by GRPC, where that is wanted. It is off while Interval is zero; zeros of the
// others are the defaults beside them.
type Health struct {
	Interval       time.Duration // between two checks of an endpoint, give or take a tenth
	Timeout        time.Duration // of a check: 2s
	UnhealthyAfter int           // failed checks in a row: 3
	HealthyAfter   int           // good checks in a row: 2
	Path           string        // a GET of it answers with 2xx or 3xx: nothing is asked
	HTTP2          bool          // the Path is asked for over HTTP/2 with prior knowledge (RFC 9113 §3.3), not over HTTP/1.1
	Host           string        // that it is sent with: the target's address, localhost for a Unix socket
	GRPC           bool          // grpc.health.v1.Health/Check in plaintext answers SERVING; not with a Path
	Service        string        // that it is asked about: the server as a whole
}

// Ejection is passive health: an endpoint that failed After connections in a
// row is not chosen for a while, For the first time and twice as long each
// time after that, up to ten times For. Then one connection tries it. Zeros
// are the defaults beside the fields; a negative After is no ejection.
type Ejection struct {
	After int           // 5
	For   time.Duration // 30s
	On5xx bool          // answers of 502, 503 and 504 count as failed connections (Loan.Status)
}

// withDefaults fills in the defaults.
func (s Settings) withDefaults() Settings {
	orElse(&s.Ejection.After, 5)
	orElse(&s.Ejection.For, 30*time.Second)
	orElse(&s.MaxIdle, 256)
	orElse(&s.IdleTimeout, time.Minute)
	orElse(&s.MaxPending, 1024)
	orElse(&s.RetryPercent, 20)
	if s.Health.Interval > 0 {
		orElse(&s.Health.Timeout, 2*time.Second)
		orElse(&s.Health.UnhealthyAfter, 3)
		orElse(&s.Health.HealthyAfter, 2)
	}
	return s
}

func orElse[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Check returns why settings cannot be, or nil.
func (s Settings) Check() error {
	switch {
	case s.Balance < 0 || int(s.Balance) >= len(balanceWords):
		return fmt.Errorf("balance %d is not one", int(s.Balance))
	case s.Health.Interval < 0 || s.Health.Timeout < 0 || s.Health.UnhealthyAfter < 0 || s.Health.HealthyAfter < 0:
		return errors.New("health: times and counts cannot be negative")
	case s.Ejection.For < 0:
		return errors.New("ejection: for cannot be negative")
	case s.IdleTimeout < 0 || s.MaxRequests < 0 || s.MaxConnections < 0:
		return errors.New("the idle timeout and the most requests and connections cannot be negative")
	case s.RetryPercent > 100:
		return fmt.Errorf("%d%% retries: want at most 100%%", s.RetryPercent)
	}
	if err := s.Health.checkPath(); err != nil {
		return err
	}
	return s.Health.checkGRPC()
}
