package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/grpctext"
)

// maxReconnect is the longest wait between two attempts: gRPC's own grows to
// two minutes, by which files would be late after a restart of the agent.
const maxReconnect = 3 * time.Second

// MaxToken bounds a token that is to be validated, in bytes.
const MaxToken = 64 << 10

// Client asks one Workload API. Answers of more than 4 MiB, gRPC's default, are
// refused.
type Client struct {
	api     *workloadapi.Client
	address string
}

// Dial makes a client; it does not wait for the API to be there. The address is
// /path, unix:/path, unix:///path, or tcp://IP:port, as in SPIFFE Workload
// Endpoint §4. Close ends it.
func Dial(address string) (*Client, error) {
	target, err := target(address)
	if err != nil {
		return nil, err
	}
	api, err := workloadapi.New(context.Background(), workloadapi.WithAddr(target),
		workloadapi.WithBackoffStrategy(reconnect{}),
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxReconnect},
			MinConnectTimeout: 5 * time.Second,
		})))
	if err != nil {
		return nil, fmt.Errorf("workload API %s: %w", address, err)
	}
	return &Client{api: api, address: address}, nil
}

// target returns the address as go-spiffe wants it.
func target(address string) (string, error) {
	if strings.HasPrefix(address, "tcp:") {
		if err := workloadapi.ValidateAddress(address); err != nil {
			return "", fmt.Errorf("workload API %q: %w", address, err)
		}
		return address, nil
	}
	path := strings.TrimPrefix(strings.TrimPrefix(address, "unix:"), "//")
	if path == "" || strings.Contains(path, "://") || strings.ContainsRune(path, 0) {
		return "", fmt.Errorf("workload API %q: want unix:/path or tcp://IP:port", address)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("workload API %q: %w", address, err)
	}
	const most = 107 // sun_path, unix(7)
	if len(path) > most {
		return "", fmt.Errorf("workload API %s: the path has %d bytes, the system allows %d", path, len(path), most)
	}
	return (&url.URL{Scheme: "unix", Path: path}).String(), nil
}

// Close ends the client.
func (c *Client) Close() error { return c.api.Close() }

// Fetch returns what the API gives as soon as it does. It asks again while
// nobody answers, until ctx ends: then its error wraps ErrUnavailable. Any other
// error is an answer, such as that there is nothing for this process.
func (c *Client) Fetch(ctx context.Context, r Request) (*Given, error) {
	asking, enough := context.WithCancel(ctx)
	defer enough()
	var given *Given
	var answer, trouble error
	err := c.Watch(asking, r, func(g *Given) {
		if given == nil && answer == nil {
			given = g
			enough()
		}
	}, func(err error) {
		switch {
		case given != nil || answer != nil || asking.Err() != nil:
		case passing(err):
			trouble = err
		default:
			answer = err
			enough()
		}
	})
	switch {
	case given != nil:
		return given, nil
	case answer != nil && status.Code(answer) == codes.PermissionDenied && !r.ID.IsZero():
		return nil, fmt.Errorf("the Workload API at %s does not give this process an SVID of %s: %s", c.address, r.ID, status.Convert(answer).Message())
	case answer != nil:
		return nil, c.Explain(answer)
	case trouble == nil:
		trouble = err
	}
	return nil, c.Explain(trouble)
}

// Validate has the API validate a JWT-SVID (SPIFFE Workload API §6.2.3). The
// signature is the agent's to check, by its bundles.
func (c *Client) Validate(ctx context.Context, token, audience string) (*jwtsvid.SVID, error) {
	if len(token) > MaxToken {
		return nil, fmt.Errorf("the token has %d bytes, of %d that are read", len(token), MaxToken)
	}
	var wait reconnectWait
	for {
		svid, err := c.api.ValidateJWTSVID(ctx, token, audience)
		switch {
		case err == nil:
			return svid, nil
		case status.Code(err) == codes.InvalidArgument:
			return nil, fmt.Errorf("not valid: %s", status.Convert(err).Message())
		case !passing(err):
			return nil, c.Explain(err)
		}
		select {
		case <-ctx.Done():
			return nil, c.Explain(err)
		case <-time.After(wait.Next()):
		}
	}
}

// Watch calls on with what the API gives at first and after each change, until
// ctx ends, and problem with what is in the way of that, again and again. Both
// are called by one goroutine at a time and hold up what comes next. It returns
// once it is over, with an error where the API refuses the request itself.
func (c *Client) Watch(ctx context.Context, r Request, on func(*Given), problem func(error)) error {
	g, ctx := errgroup.WithContext(ctx)
	s := &sheet{request: r, on: on, problem: problem, tokens: make(chan struct{}, 1)}
	for _, p := range c.parts(s) {
		s.missing++
		g.Go(func() error { return s.follow(ctx, p) })
	}
	return g.Wait()
}

// passing tells of an error that another attempt may be spared.
func passing(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted, codes.Aborted:
		return true
	}
	return errors.Is(err, io.EOF) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// answered tells of a passing error that it is the API's own answer.
func answered(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		return true
	}
	return false
}

// Explain makes of what Watch has called problem with an error that says what to
// do.
func (c *Client) Explain(err error) error {
	switch {
	case status.Code(err) == codes.PermissionDenied || err != nil && strings.Contains(err.Error(), "SVIDs in response"):
		return fmt.Errorf("the Workload API at %s has no identity for this process: is there an entry whose selectors match it? (%s)", c.address, status.Convert(err).Message())
	case status.Code(err) == codes.Unimplemented:
		return fmt.Errorf("the agent at %s does not serve this: %s", c.address, status.Convert(err).Message())
	case grpctext.OfConnection(err):
		return c.unavailable(fmt.Errorf("the Workload API does not answer: %w; is the agent running, and is this its socket?", grpctext.Plain(err)))
	case err != nil && !passing(err):
	case answered(err):
		return c.unavailable(fmt.Errorf("the Workload API cannot give it now: %w", grpctext.Plain(err)))
	default:
		return c.unavailable(errors.New("the Workload API does not answer; is the agent running?"))
	}
	return fmt.Errorf("ask the Workload API at %s: %s", c.address, status.Convert(err).Message())
}

func (c *Client) unavailable(err error) error {
	return unavailableError{fmt.Errorf("ask %s: %w", c.address, err)}
}

// unavailableError is ErrUnavailable with words of its own.
type unavailableError struct{ error }

func (e unavailableError) Unwrap() error { return e.error }

func (unavailableError) Is(target error) bool { return target == ErrUnavailable }

// reconnect is how soon the API is asked again: after 100 ms at first, then up
// to every maxReconnect, with jitter so that the processes of a node do not come
// at once.
type reconnect struct{}

// NewBackoff implements workloadapi.BackoffStrategy.
func (reconnect) NewBackoff() workloadapi.Backoff { return &reconnectWait{} }

type reconnectWait struct{ n uint }

func (r *reconnectWait) Next() time.Duration {
	d := min(100*time.Millisecond<<min(r.n, 6), maxReconnect)
	r.n++
	return d - time.Duration(rand.Int64N(int64(d/4)))
}

func (r *reconnectWait) Reset() { r.n = 0 }
