// Package attestor finds out who a local process is, and proves who this node
// is.
//
// A workload is attested in three steps: pin the process, so that its PID
// cannot come to mean another one; ask the workload attestors what they know
// of it; look whether it is still the same process.
//
//	p, err := attestor.PeerOf(conn)
//	if err != nil { … }
//	defer p.Close()
//	selectors, err := attestor.Attest(ctx, p, []attestor.Workload{
//		attestor.NewUnix(attestor.UnixConfig{DiscoverPath: true}),
//	})
//
// Attest already ends with p.Alive; whoever goes on to serve the process for
// long calls p.Alive again before handing it something new.
//
// A node attestor (Node) proves the node's identity to the SPIRE Server: its
// Attempt gives the payload of AttestAgent and answers the server's
// challenges. The call itself is left to agent/spire, what selectors entitle
// a process to is left to agent/registry, limits on how often a caller may be
// attested are left to agent/endpoint.
//
// The package works on Linux. Here are the kinds that need no more than the
// standard library: the workload attestor "unix", the node attestors
// "join_token", "x509pop" and "k8s_psat". A kind that takes more than a file
// or has a foreign dependency has a folder of its own below this one, as
// attestor/k8s.
package attestor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrAttestation is wrapped by the error of Attest when no attestor could say
// anything of the process. It says nothing against the process: the same call
// may succeed later.
var ErrAttestation = errors.New("workload attestation failed")

// ErrNotKnown is wrapped by the error of a Workload that can do its work, and
// cannot tell who this process is: it is where nothing is known of it any more, or
// what is known does not agree. That is about the process. Any other error is
// about the attestor, which is away, and says nothing of the process.
var ErrNotKnown = errors.New("not known")

// Selector is one thing known of a workload, as registration entries name it:
// the attestor's type and a value such as "uid:1000".
type Selector struct {
	Type  string
	Value string
}

// String returns the selector as SPIRE's tools write it, such as
// "unix:uid:1000".
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Compare orders selectors by type, then value.
func (s Selector) Compare(o Selector) int {
	return cmp.Or(cmp.Compare(s.Type, o.Type), cmp.Compare(s.Value, o.Value))
}

// Workload attests local processes. Its methods may be called from several
// goroutines at once.
type Workload interface {
	// Type is the type of all its selectors, such as "unix". No other
	// attestor has the same.
	Type() string

	// Attest returns what is known of p. It returns soon after ctx ends. It
	// may read p's part of /proc (see Process.ProcPath) without looking
	// after each read whether p is still alive: whoever calls Attest calls
	// p.Alive afterwards and discards the selectors if that fails. A process
	// the attestor knows nothing of has no selectors and is no error.
	Attest(ctx context.Context, p *Process) ([]Selector, error)
}

// Follower is a Workload that learns of a process what can change while it
// lives, such as the labels of its pod.
type Follower interface {
	Workload

	// Follow calls changed at most once: as soon as it is known that Attest of
	// p would not find the same any more. found is what Attest found, of this
	// attestor's type or of several. changed is called from another goroutine,
	// or before Follow returns, and does not block. stop ends the following
	// and may be called more than once; changed may still be running when it
	// returns.
	Follow(p *Process, found []Selector, changed func()) (stop func())
}

// Housing is a Workload that can tell from the kernel alone, in microseconds,
// where a process lives.
type Housing interface {
	Workload

	// House names the pod or container that p is in, empty where it is in
	// none. It is for sharing out resources among callers that are not
	// attested yet; it entitles to nothing.
	House(p *Process) string
}

// Runner is a Workload with work of its own.
type Runner interface {
	Workload

	// Run does it until ctx ends, which is no error.
	Run(ctx context.Context) error
}

// Dependent is a Workload that needs more than the kernel, such as the kubelet,
// and can attest nobody while it does not have that.
type Dependent interface {
	Workload

	// Check finds out whether it could attest processes now, and returns why
	// not and what to do about it, in one line. It returns soon after ctx ends.
	// Where it is a Runner as well, Check is called before Run only.
	Check(ctx context.Context) error

	// Problem returns what it came to when that was last tried, by Check or
	// since: nil where it can attest. It asks nobody.
	Problem() error
}

// Node attests this node to the SPIRE Server.
type Node interface {
	// Type is the name of the server's plugin, such as "join_token".
	Type() string

	// Begin gathers what one attempt needs, files read anew, and returns the
	// attempt, which the caller closes.
	Begin(ctx context.Context) (Attempt, error)
}

// Pathed is a Node that knows with what the server begins the paths of the
// SPIFFE IDs of the nodes it attests.
type Pathed interface {
	Node

	// AgentPath returns that, such as "/spire/agent/k8s_psat/demo/".
	AgentPath() string
}

// Attempt is one attempt at node attestation. It belongs to one goroutine.
type Attempt interface {
	// Payload returns what AttestAgent opens with. It is a secret for some
	// kinds and is never logged.
	Payload() []byte

	// Answer returns the response to the server's challenge.
	Answer(ctx context.Context, challenge []byte) ([]byte, error)

	// Close frees what the attempt holds.
	Close() error
}

// Adviser is an Attempt that knows what to look at where the server refuses
// it.
type Adviser interface {
	Attempt

	// Advice says so to a person, in one line without secrets.
	Advice() string
}

// Outcome is what one attestor made of a process. Which selectors it found is
// told by their type.
type Outcome struct {
	Type      string        // of the attestor
	Duration  time.Duration // of its Attest
	Selectors int           // how many it found
	Err       error         // nil when it succeeded
}

// Failure returns the error with the attestor's type before it, or nil.
func (o Outcome) Failure() error {
	if o.Err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", o.Type, o.Err)
}

// failures are those of several attestors, told on one line.
type failures []error

// Error implements error.
func (f failures) Error() string {
	texts := make([]string, len(f))
	for i, err := range f {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

// Unwrap returns all of them.
func (f failures) Unwrap() []error { return f }

// Attest asks all attestors side by side what they know of p and returns
// their selectors together, sorted and without duplicates. Some attestors may
// fail as long as one succeeds: a workload that needs only unix selectors is
// served while the kubelet is away. AttestObserved tells which did.
//
// It returns when every attestor has. The error wraps ErrProcessGone when p
// is not the pinned process any more, whatever the attestors say, and
// otherwise ErrAttestation and each attestor's error when all of them failed.
func Attest(ctx context.Context, p *Process, attestors []Workload) ([]Selector, error) {
	return AttestObserved(ctx, p, attestors, nil)
}

// AttestObserved is Attest for callers who count: observe, unless nil, is
// called once for each attestor, in the order given, from the calling
// goroutine and before AttestObserved returns.
func AttestObserved(ctx context.Context, p *Process, attestors []Workload, observe func(Outcome)) ([]Selector, error) {
	if len(attestors) == 0 {
		return nil, fmt.Errorf("attest process %d: %w: no workload attestor is configured", p.PID, ErrAttestation)
	}
	found := make([][]Selector, len(attestors))
	outcomes := make([]Outcome, len(attestors))
	ask := func(i int) {
		start := time.Now()
		selectors, err := attestors[i].Attest(ctx, p)
		if err != nil {
			selectors = nil
		}
		found[i] = selectors
		outcomes[i] = Outcome{Type: attestors[i].Type(), Duration: time.Since(start), Selectors: len(selectors), Err: err}
	}
	var others sync.WaitGroup
	for i := 1; i < len(attestors); i++ {
		others.Go(func() { ask(i) })
	}
	ask(0)
	others.Wait()

	var failed failures
	for _, o := range outcomes {
		if observe != nil {
			observe(o)
		}
		if err := o.Failure(); err != nil {
			failed = append(failed, err)
		}
	}
	// First of all: an attestor that failed because the process exited is not
	// at fault, and one that succeeded may have read of its successor.
	if err := p.Alive(); err != nil {
		return nil, fmt.Errorf("attest %w", err)
	}
	if len(failed) == len(attestors) {
		return nil, fmt.Errorf("attest process %d: %w: %w", p.PID, ErrAttestation, failed)
	}
	selectors := slices.Concat(found...)
	slices.SortFunc(selectors, Selector.Compare)
	return slices.Compact(selectors), nil
}
