package spire

import (
	"crypto/x509"
	"fmt"
	"time"
)

// ClockError is a certificate that is outside of its time by this host's
// clock. A server signs what is valid at once, and renews its own certificate
// in time: that the clocks are apart is the likelier reason.
type ClockError struct {
	What                string // "the server's certificate"
	Now                 time.Time
	NotBefore, NotAfter time.Time // of the certificate
}

func (e *ClockError) Error() string {
	now := e.Now.UTC().Format(time.RFC3339)
	if e.Now.Before(e.NotBefore) {
		return fmt.Sprintf("%s is not valid before %s, and this host's clock says %s, %s less: compare the clocks of this host and of the server",
			e.What, e.NotBefore.UTC().Format(time.RFC3339), now, e.NotBefore.Sub(e.Now).Round(time.Second))
	}
	return fmt.Sprintf("%s is valid until %s, and this host's clock says %s, %s more: compare the clocks of this host and of the server",
		e.What, e.NotAfter.UTC().Format(time.RFC3339), now, e.Now.Sub(e.NotAfter).Round(time.Second))
}

// backdate is by how much SPIRE Server dates back what it signs, for clocks
// that are behind its own.
const backdate = 10 * time.Second

// signedAt is the time at which a chain is verified that the server has signed
// just now: the present, or where the leaf is not valid by this host's clock
// about what the server's clock must say. That clock is the one that counts for
// whom the SVID is presented to.
func signedAt(leaf *x509.Certificate, now time.Time) time.Time {
	if !now.Before(leaf.NotBefore) && !now.After(leaf.NotAfter) {
		return now
	}
	at := leaf.NotBefore.Add(backdate)
	if at.After(leaf.NotAfter) {
		return leaf.NotAfter
	}
	return at
}
