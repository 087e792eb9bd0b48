//go:build integration

package kubernetes_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// shop is a namespace with the service inventory and those who call it, each
// in a pod with a proxy beside it. Identities are given by namespace and
// service account.
type shop struct {
	t         *testing.T
	namespace string
	agent     *provider
	callers   []string
}

// openShop starts the pods. Nobody but orders is allowed to call inventory;
// all try, but for the caller named idle.
func openShop(t *testing.T, agent *provider, callers ...string) *shop {
	t.Helper()
	s := &shop{t: t, agent: agent, callers: callers, namespace: k8s.namespace(t)}
	var entries []entry
	for _, app := range s.apps() {
		entries = append(entries, entry{path: s.path(app), selectors: []string{"k8s:ns:" + s.namespace, "k8s:sa:" + app}})
	}
	register(t, entries...)
	s.rules("orders")
	for _, app := range s.apps() {
		k8s.rolledOut(t, s.namespace, "deployment/"+app)
	}
	return s
}

func (s *shop) apps() []string          { return append([]string{"inventory"}, s.callers...) }
func (s *shop) path(app string) string  { return "/ns/" + s.namespace + "/sa/" + app }
func (s *shop) id(app string) string    { return trustDomain + s.path(app) }
func (s *shop) label(app string) string { return "app=" + app }

// rules are written so that only those callers may call inventory.
func (s *shop) rules(allowed ...string) {
	s.t.Helper()
	rules := fmt.Sprintf("version: 1\nrules:\n  - {id: all-out, effect: allow, at: outbound, from: [%q]}\n", trustDomain+s.path("*"))
	for _, a := range allowed {
		rules += fmt.Sprintf("  - {id: %s-calls, effect: allow, at: inbound, from: [%q], to: [%q]}\n", a, s.id(a), s.id("inventory"))
	}
	k8s.apply(s.t, render(s.t, "shop.yaml", map[string]any{
		"Namespace": s.namespace, "Rules": rules, "Callers": s.callers, "Apps": s.apps(), "Sockets": s.agent.sockets,
	}))
}

// calls returns what a container of an app's pod has said. It waits for a
// kubelet that has just been started.
func (s *shop) calls(app, container string) (events []event) {
	s.t.Helper()
	stage.Eventually(s.t, ready, "the kubelet shows the log of "+app, func() (err error) {
		events, err = k8s.events(s.namespace, k8s.pod(s.t, s.namespace, s.label(app)).name(), container)
		return err
	})
	return events
}

// totals returns how many calls went well so far, and how many did not.
func (s *shop) totals(caller, container string) (good, failed int) {
	s.t.Helper()
	for _, e := range s.calls(caller, container) {
		if e.Event == "total" {
			good, failed = e.Good, e.Failed
		}
	}
	return good, failed
}

// goOn waits until so many more calls of both kinds have gone well than now.
func (s *shop) goOn(caller string, more int) {
	s.t.Helper()
	for _, container := range []string{"app", "live"} {
		before, _ := s.totals(caller, container)
		stage.Eventually(s.t, ready, fmt.Sprintf("%s (%s) is answered", caller, container), func() error {
			good, failed := s.totals(caller, container)
			if good < before+more {
				return fmt.Errorf("%d calls more went well, %d failed", good-before, failed)
			}
			return nil
		})
	}
}

// record waits for a line of the access log of an app's proxy.
func (s *shop) record(app, what string, ok func(telemetry.Access) bool) telemetry.Access {
	s.t.Helper()
	var found telemetry.Access
	stage.Eventually(s.t, ready, app+" has an access record: "+what, func() error {
		all, err := lines[telemetry.Access](k8s.log(s.namespace, k8s.pod(s.t, s.namespace, s.label(app)).name(), "proxy"))
		if err != nil {
			return err
		}
		at := slices.IndexFunc(all, ok)
		if at < 0 {
			return fmt.Errorf("there are %d others: %+v", len(all), all[max(0, len(all)-3):])
		}
		found = all[at]
		return nil
	})
	return found
}

// TestShop runs two services whose proxies get their identities from the
// agent on the node: one may call, by rules, and one may not.
func TestShop(t *testing.T) {
	withEach(t, func(t *testing.T, agent *provider) {
		s := openShop(t, agent, "orders", "reports", "idle")
		s.goOn("orders", 20)
		s.record("inventory", "allowed", func(a telemetry.Access) bool {
			return a.Decision == "allow" && a.Rule == "orders-calls" && a.From == s.id("orders") && a.To == s.id("inventory")
		})
		s.record("inventory", "denied", func(a telemetry.Access) bool {
			return a.Decision == "deny" && a.From == s.id("reports")
		})
		if good, failed := s.totals("reports", "app"); good != 0 || failed == 0 {
			t.Errorf("reports, which no rule allows: %d calls went well and %d failed", good, failed)
		}

		// A changed ConfigMap reaches the proxies by the symlink that kubelet
		// swaps, and their live connections.
		s.rules()
		s.record("inventory", "closed by the new rules", func(a telemetry.Access) bool {
			return a.From == s.id("orders") && a.Closed == "policy"
		})
		k8s.happens(t, s.namespace, k8s.pod(t, s.namespace, "app=orders").name(), "live", 0, "fails", func(e event) bool { return e.Event == "failed" })
		s.rules("orders")
		s.goOn("orders", 20)
		if restarted := proxyRestarts(s); restarted != "" {
			t.Error("proxies were restarted: " + restarted)
		}
		if k8s.own {
			withinMemory(t, "an idle proxy", k8s.process(t, k8s.pod(t, s.namespace, "app=idle"), "proxy"), 20<<20)
		}
	})
}

// proxyRestarts names the proxies that did not live through it all.
func proxyRestarts(s *shop) string {
	var restarted []string
	for _, app := range s.apps() {
		p := k8s.pod(s.t, s.namespace, s.label(app))
		if c, _ := p.container("proxy"); c.RestartCount != 0 {
			restarted = append(restarted, fmt.Sprintf("%s %d times", p.name(), c.RestartCount))
		}
	}
	return strings.Join(restarted, ", ")
}
