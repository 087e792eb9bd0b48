package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// WorkloadAPIConfig says where the SPIFFE Workload API is.
type WorkloadAPIConfig struct {
	Socket string // /path, unix:/path, or an address as in SPIFFE_ENDPOINT_SOCKET
	Log    hclog.Logger
}

// WorkloadAPI is a source of identities that holds what a SPIFFE Workload API
// gives this process, from any agent. While the API is away the last SVIDs
// serve until they expire. An SVID that the API has taken back (it answers
// PermissionDenied, or an update leaves it out) is not used any more
// (SPIFFE Workload API §5.2.1).
type WorkloadAPI struct {
	*store
	log    hclog.Logger
	client *workloadapi.Client
	ctx    context.Context // of the watch
	cancel context.CancelFunc
	watch  sync.WaitGroup
}

// NewWorkloadAPI starts to watch. It does not wait for the API to be there.
// Close ends it.
func NewWorkloadAPI(c WorkloadAPIConfig) (*WorkloadAPI, error) {
	address := c.Socket
	switch {
	case strings.HasPrefix(address, "/"):
		address = "unix://" + address
	case strings.HasPrefix(address, "unix:/") && !strings.HasPrefix(address, "unix://"):
		address = "unix://" + strings.TrimPrefix(address, "unix:")
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	client, err := workloadapi.New(context.Background(), workloadapi.WithAddr(address),
		workloadapi.WithBackoffStrategy(reconnect{}),
		// gRPC's own backoff grows to two minutes: a proxy would be that
		// late after a restart of its agent.
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxReconnect},
			MinConnectTimeout: 5 * time.Second,
		})))
	if err != nil {
		return nil, fmt.Errorf("workload API %s: %w", c.Socket, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &WorkloadAPI{
		store: newStore("workload_api", fmt.Errorf("nothing received yet from the Workload API at %s", c.Socket)),
		log:   c.Log, client: client, ctx: ctx, cancel: cancel,
	}
	w.watch.Go(w.run)
	return w, nil
}

// Close stops watching and waits for that to end. Leases keep what they had.
func (w *WorkloadAPI) Close() error {
	w.cancel()
	w.watch.Wait()
	if err := w.client.Close(); err != nil {
		return fmt.Errorf("close workload API client: %w", err)
	}
	return nil
}

// run watches until Close. The library gives up for good on some answers
// (Canceled, InvalidArgument) that an agent may send while it restarts.
func (w *WorkloadAPI) run() {
	wait := reconnect{}.NewBackoff()
	for {
		_ = w.client.WatchX509Context(w.ctx, w) // each error comes to OnX509ContextWatchError
		select {
		case <-time.After(wait.Next()):
		case <-w.ctx.Done():
			return
		}
	}
}

// OnX509ContextUpdate takes an update, which is always complete: what it
// leaves out was taken back.
func (w *WorkloadAPI) OnX509ContextUpdate(x *workloadapi.X509Context) {
	certs := make([]hinted, 0, len(x.SVIDs))
	for _, svid := range x.SVIDs {
		cert := tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
		for _, c := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		certs = append(certs, hinted{cert, svid.Hint})
	}
	authorities := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for _, b := range x.Bundles.Bundles() {
		authorities[b.TrustDomain()] = b.X509Authorities()
	}
	if err := w.set(certs, authorities); err != nil {
		w.OnX509ContextWatchError(err)
	}
}

// OnX509ContextWatchError notes why there is no update, and forgets the
// identities where the API refuses them.
func (w *WorkloadAPI) OnX509ContextWatchError(err error) {
	if w.ctx.Err() != nil {
		return // it is us who end
	}
	if status.Code(err) == codes.PermissionDenied || emptyUpdate(err) {
		w.withdraw(fmt.Errorf("the Workload API has no identity for this process: is there an entry whose selectors match it? (%w)", err))
	}
	news, first := w.trouble(fmt.Errorf("workload API: %w", err))
	switch {
	case news && first:
		w.log.Info("waiting for the Workload API", "error", err)
	case news:
		w.log.Warn("no news from the Workload API", "error", err)
	}
}

// emptyUpdate recognises an update without any SVID, for which the library
// has no error of its own.
func emptyUpdate(err error) bool { return strings.Contains(err.Error(), "no SVIDs in response") }

// reconnect is how soon the Workload API is asked again: after 100 ms at
// first, then up to every maxReconnect, with jitter so that the proxies of a
// node do not come at once.
type reconnect struct{}

const maxReconnect = 3 * time.Second

// NewBackoff implements workloadapi.BackoffStrategy.
func (reconnect) NewBackoff() workloadapi.Backoff { return &reconnectWait{} }

type reconnectWait struct{ n uint }

func (r *reconnectWait) Next() time.Duration {
	d := min(100*time.Millisecond<<min(r.n, 6), maxReconnect)
	r.n++
	return d - time.Duration(rand.Int64N(int64(d/4)))
}

func (r *reconnectWait) Reset() { r.n = 0 }
