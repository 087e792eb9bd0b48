package identity

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/grpctext"
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
// (SPIFFE Workload API §5.2.1). The same goes for JWT-SVIDs and JWT bundles,
// which it asks for once somebody needs them (Tokens). The API is asked for as
// long as there are leases: a proxy without listeners needs no identity, and
// may have no entry.
type WorkloadAPI struct {
	*store
	*jwtSource
	log    hclog.Logger
	client *workloadapi.Client
	idle   error // why nothing is held while there are no leases

	mu     sync.Mutex // guards the following
	leases int
	watch  *apiWatch // nil while there are no leases
	closed bool

	cancel context.CancelFunc // of what follows JWT bundles and renews tokens
}

var _ Tokens = (*WorkloadAPI)(nil)

// NewWorkloadAPI makes a source that begins to watch with its first lease. It
// does not wait for the API to be there. Close ends it.
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
	idle := fmt.Errorf("nothing received yet from the Workload API at %s", c.Socket)
	w := &WorkloadAPI{store: newStore("workload_api", idle), log: c.Log, idle: idle}
	client, err := workloadapi.New(context.Background(), workloadapi.WithAddr(address),
		workloadapi.WithBackoffStrategy(reconnect{}),
		workloadapi.WithDialOptions(grpc.WithChainStreamInterceptor(w.sift)),
		// gRPC's own backoff grows to two minutes: a proxy would be that
		// late after a restart of its agent.
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxReconnect},
			MinConnectTimeout: 5 * time.Second,
		})))
	if err != nil {
		return nil, fmt.Errorf("workload API %s: %w", c.Socket, err)
	}
	w.client = client
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	w.jwtSource = newJWTSource(ctx, client, w.ring, c)
	return w, nil
}

// Own implements Source. The first lease begins the watch.
func (w *WorkloadAPI) Own(ctx context.Context, pick Pick) (Lease, error) {
	lease, err := w.store.Own(ctx, pick)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leases++
	if w.watch == nil && !w.closed {
		w.watch = w.follow()
	}
	return &apiLease{Lease: lease, of: w}, nil
}

// Report implements Source. That nothing is held is no problem while nobody
// needs it.
func (w *WorkloadAPI) Report() Report {
	r := w.store.Report()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leases == 0 {
		r.Problem = ""
		return r
	}
	r.Problem = cmp.Or(r.Problem, w.jwtTrouble())
	return r
}

// giveBack ends the watch with the last lease. What is held is forgotten: it
// may be taken back while nobody listens.
func (w *WorkloadAPI) giveBack() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leases--; w.leases > 0 || w.watch == nil {
		return
	}
	w.watch.stop()
	w.watch = nil
	w.forget(w.idle)
	w.retain(nil)
}

// apiLease is a lease that the watch goes on for.
type apiLease struct {
	Lease
	of    *WorkloadAPI
	given sync.Once
}

// Close implements Lease.
func (l *apiLease) Close() { l.given.Do(l.of.giveBack) }

// Close stops watching and waits for that to end. Leases keep what they had.
func (w *WorkloadAPI) Close() error {
	w.cancel()
	w.end()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.watch != nil {
		w.watch.stop()
		w.watch = nil
	}
	if err := w.client.Close(); err != nil {
		return fmt.Errorf("close workload API client: %w", err)
	}
	return nil
}

// apiWatch is one watch of the Workload API.
type apiWatch struct {
	*WorkloadAPI
	ctx    context.Context
	cancel context.CancelFunc
	ended  chan struct{}

	// For the watch's goroutine.
	since  time.Time // when news failed to come; zero: it comes
	warned bool      // of that
}

// warnAfter is how long the Workload API may be away before that is worth a
// warning: an agent that is replaced by a new version is, for a second or so.
const warnAfter = 10 * time.Second

// follow begins a watch, which stop ends.
func (w *WorkloadAPI) follow() *apiWatch {
	a := &apiWatch{WorkloadAPI: w, ended: make(chan struct{})}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	go a.run()
	return a
}

// stop waits until no update comes any more.
func (a *apiWatch) stop() {
	a.cancel()
	<-a.ended
}

// run watches until stop. The library gives up for good on some answers
// (Canceled, InvalidArgument) that an agent may send while it restarts.
func (a *apiWatch) run() {
	defer close(a.ended)
	wait := reconnect{}.NewBackoff()
	for {
		_ = a.client.WatchX509Context(a.ctx, a) // each error comes to OnX509ContextWatchError
		select {
		case <-time.After(wait.Next()):
		case <-a.ctx.Done():
			return
		}
	}
}

// sift takes out of each update the SVIDs that are none. The library would
// refuse the update as a whole, and with it those that are good and the
// bundles, an authority that was withdrawn among them.
func (w *WorkloadAPI) sift(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &sifted{ClientStream: s, log: w.log}, nil
}

type sifted struct {
	grpc.ClientStream
	log  hclog.Logger
	said string // why the last update was not whole
}

// RecvMsg implements grpc.ClientStream.
func (s *sifted) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil {
		return err
	}
	switch update := m.(type) {
	case *workload.X509SVIDResponse:
		s.say("the Workload API gave an SVID that is not good: the others are used", dropBad(update))
	case *workload.JWTBundlesResponse:
		s.say("the Workload API gave a JWT authority that is not good: the others are used", siftBundles(update))
	}
	return nil
}

// say tells of what was dropped, unless the update before was no better.
func (s *sifted) say(what string, bad error) {
	switch {
	case bad == nil:
		s.said = ""
	case s.said != bad.Error():
		s.log.Warn(what, "error", bad)
		s.said = bad.Error()
	}
}

// dropBad takes out of update every SVID that cannot be used, and tells why.
// Their bundles stay. An update without any good one stays as it is, for the
// library to say that it is none.
func dropBad(update *workload.X509SVIDResponse) error {
	var good, bad []*workload.X509SVID
	var problems []error
	for _, svid := range update.Svids {
		if err := checkSVID(svid); err != nil {
			bad, problems = append(bad, svid), append(problems, fmt.Errorf("%.512q: %w", svid.GetSpiffeId(), err))
			continue
		}
		good = append(good, svid)
	}
	if len(good) == 0 || len(bad) == 0 {
		return nil
	}
	held := map[spiffeid.TrustDomain]bool{}
	for _, svid := range good {
		if id, err := spiffeid.FromString(svid.SpiffeId); err == nil {
			held[id.TrustDomain()] = true
		}
	}
	for name := range update.FederatedBundles {
		if td, err := spiffeid.TrustDomainFromString(name); err == nil {
			held[td] = true
		}
	}
	for _, svid := range bad {
		id, err := spiffeid.FromString(svid.GetSpiffeId())
		if err != nil || held[id.TrustDomain()] {
			continue
		}
		if certs, err := x509.ParseCertificates(svid.GetBundle()); err == nil && len(certs) > 0 {
			if update.FederatedBundles == nil {
				update.FederatedBundles = map[string][]byte{}
			}
			update.FederatedBundles[id.TrustDomain().IDString()] = svid.GetBundle()
		}
	}
	update.Svids = good
	return errors.Join(problems...)
}

func checkSVID(svid *workload.X509SVID) error {
	if svid == nil {
		return errors.New("is empty")
	}
	parsed, err := x509svid.ParseRaw(svid.X509Svid, svid.X509SvidKey)
	if err != nil {
		return err
	}
	_, err = checkLeaf(parsed.Certificates[0])
	return err
}

// OnX509ContextUpdate takes an update, which is always complete: what it
// leaves out was taken back.
func (a *apiWatch) OnX509ContextUpdate(x *workloadapi.X509Context) {
	certs := make([]SVID, 0, len(x.SVIDs))
	ours := make([]spiffeid.ID, 0, len(x.SVIDs))
	for _, svid := range x.SVIDs {
		ours = append(ours, svid.ID)
		cert := tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
		for _, c := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		certs = append(certs, SVID{cert, svid.Hint})
	}
	authorities := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for _, b := range x.Bundles.Bundles() {
		authorities[b.TrustDomain()] = b.X509Authorities()
	}
	a.retain(ours)
	if err := a.set(certs, authorities); err != nil {
		a.OnX509ContextWatchError(err)
		return
	}
	a.since, a.warned = time.Time{}, false
}

// OnX509ContextWatchError notes why there is no update, and forgets the
// identities where the API refuses them.
func (a *apiWatch) OnX509ContextWatchError(err error) {
	if a.ctx.Err() != nil {
		return // it is us who end
	}
	err = grpctext.Plain(err)
	refused := status.Code(err) == codes.PermissionDenied || emptyUpdate(err)
	if refused {
		a.retain(nil)
		a.withdraw(fmt.Errorf("the Workload API has no identity for this process: is there an entry whose selectors match it? (%w)", err))
	}
	if a.since.IsZero() {
		a.since = time.Now()
	}
	news, first := a.trouble(fmt.Errorf("workload API: %w", err))
	late := refused || time.Since(a.since) >= warnAfter
	switch {
	case news && first:
		a.log.Info("waiting for the Workload API", "error", err)
	case !first && late && (news || !a.warned):
		a.warned = true
		a.log.Warn("no news from the Workload API", "error", err)
	case !first && news:
		a.log.Info("no news from the Workload API", "error", err)
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
