package agent_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/testca"
)

// beside makes the stage's agent one of the fake server.
func (s *stage) beside(f *fake) {
	s.t.Helper()
	s.stop()
	s.cfg.Server, s.cfg.Node = f.addr, attestor.JoinToken{Token: "any"}
	s.bundle(testca.CertPEM(f.ca.Cert.Raw))
}

func uid() string { return fmt.Sprint(os.Getuid()) }

// saved returns the certificates of the saved bundle, and whether the agent has
// an SVID.
func (s *stage) saved() (bundle [][]byte, svid bool) {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.cfg.DataDir, "agent.json"))
	var kept struct{ Bundle, SVID [][]byte }
	if err == nil {
		err = json.Unmarshal(data, &kept)
	}
	if err != nil {
		s.t.Fatalf("%s: %v", data, err)
	}
	return kept.Bundle, len(kept.SVID) > 0
}

// Entries and bundles do not wait for each other.
func TestEntriesAndBundlesAreApart(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	f.entries = []*types.Entry{entryFor("one", uid())}
	a, _ := s.start()
	s.mustFetch()

	second := testca.New(t, td.Name())
	f.change(func() {
		f.entriesErr = status.Error(codes.Internal, "the database is away")
		f.authorities = append(f.authorities, second)
	})
	eventually(t, "the new authority, though entries cannot be had", func() bool {
		bundle, _ := s.saved()
		return len(bundle) == 2
	})
	eventually(t, "the status says so", func() bool { // the authority may have come with a sync that had its entries before
		return strings.Contains(a.Status().Problem, "the database is away")
	})

	f.change(func() {
		f.entriesErr = nil
		f.federatedErr = status.Error(codes.Internal, "no bundles today")
		f.entries = append(f.entries, entryFor("two", uid(), "partner.example"))
	})
	eventually(t, "the entry, though the bundle it federates with cannot be had", func() bool { return len(a.Status().Identities) == 2 })
}

func TestServerWithoutSyncAuthorizedEntries(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	f.old, f.entries = true, []*types.Entry{entryFor("one", uid())}
	f.statusErr = status.Error(codes.Unimplemented, "unknown method PostStatus")
	a, _ := s.start()
	s.mustFetch()
	f.change(func() { f.entries = nil })
	eventually(t, "the entry is removed", func() bool { return a.Status().Entries == 0 })
	f.change(func() { f.old, f.entries = false, []*types.Entry{entryFor("two", uid())} })
	if got := s.mustFetch().ID.Path(); got != "/two" {
		t.Errorf("after an upgrade of the server it serves %s", got)
	}
	if problem := a.Status().Problem; problem != "" {
		t.Errorf("the status says %q", problem)
	}
}

// The server is told the version at each start, and so after each upgrade.
func TestVersionIsTold(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	for _, version := range []string{"v1", "v2"} {
		s.cfg.Version = version
		_, stop := s.start()
		eventually(t, "the version "+version, f.is(func() bool { return slices.Contains(f.versions, version) }))
		stop()
	}
	if f.change(func() {}); len(f.versions) != 2 || f.attested != 1 {
		t.Errorf("told %v in %d attestations", f.versions, f.attested)
	}
}

// A node that the server wants to attest again instead of renewing does so,
// without a moment in which it has no SVID.
func TestRenewalByAttestation(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	f.reattestable, f.agentTTL = false, 3*time.Second
	f.renewErr = denial(t, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	f.entries = []*types.Entry{entryFor("one", uid())}
	a, _ := s.start()
	s.mustFetch()
	eventually(t, "another attestation", f.is(func() bool { return f.attested >= 2 }))
	if status := a.Status(); status.ID == "" || status.Problem != "" {
		t.Errorf("the status: %+v", status)
	}
}

// A server that was set up anew has another authority. The agent begins anew
// with the bundle of its file once it has been strange for the delay, and has
// everything signed by the new one.
func TestRebootstrap(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	s.cfg.Rebootstrap = agent.Rebootstrap{Mode: "auto", Delay: time.Second}
	f.entries = []*types.Entry{entryFor("one", uid())}
	a, _ := s.start()
	old := s.mustFetch()

	f.stop()
	second := newFake(t, f.addr)
	second.entries = f.entries
	second.start()
	eventually(t, "what the agent waits for", func() bool { return strings.Contains(a.Status().Problem, "the agent bootstraps again at") })
	if a.Unready() != nil {
		t.Error("workloads are not served while the server is strange")
	}
	// The file is the old server's still: nothing is given up for it.
	eventually(t, "a vain attempt", func() bool { return strings.Contains(a.Status().Problem, "bootstrap again") })
	if bundle, svid := s.saved(); !svid || len(bundle) != 1 {
		t.Errorf("%d authorities and an SVID (%t) are left", len(bundle), svid)
	}
	s.bundle(testca.CertPEM(second.ca.Cert.Raw))
	eventually(t, "the new server's SVID", func() bool {
		ids := a.Status().Identities
		return len(ids) == 1 && ids[0].Serial != serialOf(old)
	})
	got := s.mustFetch()
	if want := hex.EncodeToString(second.ca.Cert.SubjectKeyId); hex.EncodeToString(got.Certificates[0].AuthorityKeyId) != want {
		t.Errorf("the workload's SVID is of authority %x, want %s", got.Certificates[0].AuthorityKeyId, want)
	}
	if problem := a.Status().Problem; problem != "" {
		t.Errorf("the status says %q", problem)
	}
}

// An agent that was told to bootstrap again always says at once that it could
// not.
func TestRebootstrapOfANodeThatAttestsOnce(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	f.reattestable = false
	s.cfg.Rebootstrap = agent.Rebootstrap{Mode: "always"}
	a, err := agent.New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "set it to auto or never") {
		t.Errorf("Run: %v", err)
	}
}

// Of several servers behind one address, one that is behind takes nothing back,
// and what all of them took back is gone within two intervals.
func TestSeveralServers(t *testing.T) {
	t.Parallel()
	s, ahead := newStage(t), newFake(t, "127.0.0.1:0").start()
	behind := newFake(t, "127.0.0.1:0")
	behind.ca, behind.authorities = ahead.ca, ahead.authorities
	behind.start()
	s.beside(ahead)
	vip := newForwarder(t, ahead.addr)
	s.cfg.Server = vip.Addr().String()
	ahead.entries = []*types.Entry{entryFor("one", uid())}
	a, _ := s.start()
	svid := s.mustFetch()

	asked := func(n float64) func() bool {
		before := s.syncs()
		return func() bool { return s.syncs() >= before+n }
	}
	turned := time.Now()
	vip.turn(behind.addr)
	eventually(t, "syncs with the other server", asked(3))
	if ids := a.Status().Identities; time.Since(turned) < 4*time.Second && (len(ids) != 1 || ids[0].Serial != serialOf(svid)) { // later it may have been confirmed
		t.Errorf("a server that is behind took back the SVID: %+v", ids)
	}
	behind.change(func() { behind.entries = ahead.entries })
	eventually(t, "syncs with it when it is no more", asked(2))
	vip.turn(ahead.addr)
	for _, f := range []*fake{ahead, behind} {
		f.change(func() { f.entries = nil })
	}
	eventually(t, "the removal", func() bool { return a.Status().Entries == 0 })
}

// While many SVIDs are signed, what becomes more urgent meanwhile does not wait
// for the last of them, and no call asks for more than the server signs at once.
func TestMissingSVIDDoesNotWaitForARotation(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	const many = 1500
	s.cfg.X509Cache = 2 * many
	for i := range many {
		f.entries = append(f.entries, entryFor(fmt.Sprintf("other%04d", i), "4294967294"))
	}
	f.signs = make(chan struct{})
	a, _ := s.start()
	eventually(t, "the entries", func() bool { return a.Status().Entries == many })
	f.signs <- struct{}{}
	f.change(func() { f.entries = append(f.entries, entryFor("mine", uid())) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		for { // it may be denied first, where this machine is too busy for a sync within a second
			if _, err := s.fetch(); err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
				return
			}
		}
	}()
	for waits := true; waits; {
		select {
		case f.signs <- struct{}{}:
		case <-done:
			waits = false
		}
	}
	s.mustFetch()
	f.mu.Lock()
	signed := 0
	for _, ids := range f.signed {
		signed += len(ids)
	}
	f.mu.Unlock()
	if signed >= many {
		t.Errorf("a caller waited until %d of %d were signed", signed, many)
	}
	close(f.signs)
}

// A node that attests once has its SVID, by whatever clock: it waits for the clock
// to be set, and does not lose what its token was given for.
func TestClockAheadOfTheServers(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	f.reattestable, f.agentTTL, f.clock = false, 10*time.Minute, -30*time.Minute
	a, _ := s.start()
	says := func() bool {
		return strings.Contains(a.Status().Problem, "the agent's SVID is valid until") && strings.Contains(a.Status().Problem, "this host's clock says")
	}
	eventually(t, "it says what is wrong", says)
	if _, svid := s.saved(); !svid || a.Unready() == nil {
		t.Errorf("its SVID is saved: %t; callers are told %v", svid, a.Unready())
	}
	eventually(t, "and says so still", says)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.attested != 1 {
		t.Errorf("it attested %d times", f.attested)
	}
}

// Workloads' SVIDs that are over by this host's clock are not served, and the
// status says why there are none.
func TestWorkloadSVIDByAClockAhead(t *testing.T) {
	t.Parallel()
	s, f := newStage(t), newFake(t, "127.0.0.1:0").start()
	s.beside(f)
	f.entries = []*types.Entry{entryFor("one", uid())}
	f.agentTTL, f.clock = 4*time.Hour, -2*time.Hour
	a, _ := s.start()
	eventually(t, "it says what is wrong", func() bool { return strings.Contains(a.Status().Problem, "the SVID is valid until") })
	if ids := a.Status().Identities; len(ids) > 0 {
		t.Errorf("it has %+v", ids)
	}
	f.change(func() { f.clock = 0 })
	s.mustFetch()
	eventually(t, "it has nothing more to say", func() bool { return a.Status().Problem == "" })
}
