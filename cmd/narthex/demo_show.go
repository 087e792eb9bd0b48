package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// show makes the first calls and prints them; unless once, it goes on.
func (d *demo) show(ctx context.Context, failed <-chan error, once bool) error {
	if err := d.firstCalls(ctx, failed); err != nil {
		return err
	}
	if once {
		return nil // the status page is gone before anybody could look
	}
	fmt.Fprintf(d.out, "\n  status page  http://%s/   (metrics at /metrics, JSON at /api/v1/status)\n", d.page)
	fmt.Fprintf(d.out, "\n  orders goes on calling every second; SVIDs live %s and rotate at half of that. Ctrl-C ends it.\n\n", demoTTL)
	return d.goOn(ctx, failed)
}

// firstCalls shows who everybody is, one call that a rule allows and one that
// none does.
func (d *demo) firstCalls(ctx context.Context, failed <-chan error) error {
	body, err := d.untilAllowed(ctx, failed)
	if err != nil {
		return err
	}
	answered := time.Since(d.started)
	status, err := d.askStatus(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "  agent        %s\n", status.Agent.ID)
	for _, identity := range status.Agent.Identities {
		fmt.Fprintf(d.out, "  identity     %-32s lives %s more, serial %s\n", identity.SPIFFEID, left(identity.NotAfter), short(identity.Serial))
	}
	if status.FIPS != "" {
		fmt.Fprintf(d.out, "  FIPS 140-3   module %s is on\n", status.FIPS)
	}
	allowed, ok := d.record(ctx, d.id("orders").String(), "allow", demoPatient)
	if !ok {
		return errors.New("inventory's proxy wrote no access record of a call that it allowed")
	}
	fmt.Fprintf(d.out, "\n  allowed      orders  -> inventory   GET /stock/espresso: %s\n", body)
	fmt.Fprintf(d.out, "               rule %q; first answer %.2f s after the start\n", allowed.Rule, answered.Seconds())

	if err := d.forbidden(ctx); err != nil {
		return err
	}
	refused, err := d.untilRefused(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "  refused      reports -> inventory   by inventory's proxy: %s\n", refused.Reason)
	return nil
}

// forbidden shows a request of orders that the same rule does not allow: already
// its own proxy says so, as the rules bind at both ends.
func (d *demo) forbidden(ctx context.Context) error {
	status, body, err := d.request(ctx, http.MethodDelete, "orders-to-inventory")
	if err != nil {
		return err
	}
	if status != http.StatusForbidden {
		return fmt.Errorf("DELETE should have been forbidden, and was answered %d: %s", status, body)
	}
	ctx, cancel := context.WithTimeout(ctx, demoPatient)
	defer cancel()
	a, ok := d.records.take(ctx, func(a *telemetry.Access) bool { return a.HTTP != nil && a.HTTP.Method == http.MethodDelete })
	if !ok {
		return errors.New("orders' proxy wrote no access record of a request that it refused")
	}
	fmt.Fprintf(d.out, "  forbidden    orders  -> inventory   DELETE /stock/espresso: %d, by orders' own proxy: %s\n", status, a.Reason)
	return nil
}

// untilRefused calls as reports until inventory's proxy has refused it: the
// first calls may fail already at reports' own proxy, which waits for its
// identity.
func (d *demo) untilRefused(ctx context.Context) (telemetry.Access, error) {
	for deadline := time.Now().Add(demoPatient); time.Now().Before(deadline) && ctx.Err() == nil; {
		if body, err := d.call(ctx, "reports-to-inventory"); err == nil {
			return telemetry.Access{}, fmt.Errorf("the call of reports should have been refused, and was answered: %s", body)
		}
		if refused, ok := d.record(ctx, d.id("reports").String(), "deny", time.Second); ok {
			return refused, nil
		}
	}
	return telemetry.Access{}, fmt.Errorf("no call of reports reached inventory's proxy within %s\n%s%s", demoPatient,
		d.logOf("reports-proxy"), d.logOf("inventory-proxy"))
}

// untilAllowed calls as orders until inventory answers.
func (d *demo) untilAllowed(ctx context.Context, failed <-chan error) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, demoPatient)
	defer cancel()
	for {
		body, err := d.call(ctx, "orders-to-inventory")
		if err == nil {
			return body, nil
		}
		select {
		case failure := <-failed:
			return "", failure
		case <-ctx.Done():
			return "", fmt.Errorf("no call was allowed within %s: %w\n%s%s%s", demoPatient, err,
				d.logOf("agent"), d.logOf("orders-proxy"), d.logOf("inventory-proxy"))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// call asks for the stock as the service whose proxy listens under that name.
// Each call is a connection of its own, so that each is decided and recorded.
func (d *demo) call(ctx context.Context, listener string) (string, error) {
	status, body, err := d.request(ctx, http.MethodGet, listener)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("answered %d %s", status, http.StatusText(status))
	}
	return body, err
}

func (d *demo) request(ctx context.Context, method, listener string) (status int, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+d.addr(listener)+"/stock/espresso", nil)
	if err != nil {
		return 0, "", err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return 0, "", err
	}
	return resp.StatusCode, string(b[:max(0, len(b)-1)]), nil
}

// record waits for what inventory's proxy wrote of a call.
func (d *demo) record(ctx context.Context, from, decision string, patience time.Duration) (telemetry.Access, bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return d.records.take(ctx, func(a *telemetry.Access) bool {
		return a.Listener == "inventory" && a.From == from && a.Decision == decision
	})
}

func (d *demo) askStatus(ctx context.Context) (*telemetry.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.page+"/api/v1/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask for the status: %w", err)
	}
	defer resp.Body.Close()
	var s telemetry.Status
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&s); err != nil {
		return nil, fmt.Errorf("read the status: %w", err)
	}
	if s.Agent == nil {
		return nil, fmt.Errorf("read the status: the agent's half is missing\n%s", d.logOf("agent"))
	}
	return &s, nil
}

// goOn calls every second, and tells every ten what has happened, until ctx
// ends.
func (d *demo) goOn(ctx context.Context, failed <-chan error) error {
	serials := map[string]string{}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var allowed, refused, lost int
	for second := 1; ; second++ {
		select {
		case <-ctx.Done():
			fmt.Fprintf(d.out, "\n  ended after %d allowed, %d refused and %d failed calls\n", allowed, refused, lost)
			return nil
		case err := <-failed:
			return err
		case <-tick.C:
		}
		if _, err := d.call(ctx, "orders-to-inventory"); err == nil {
			allowed++
		} else if ctx.Err() == nil {
			lost++
			fmt.Fprintf(d.out, "  failed       orders  -> inventory   %v\n", err)
		}
		if second%5 == 0 {
			if _, err := d.call(ctx, "reports-to-inventory"); err != nil && ctx.Err() == nil {
				refused++
			}
		}
		d.tellRotations(ctx, serials)
		if second%10 == 0 {
			fmt.Fprintf(d.out, "  %s  %d calls of orders allowed, %d failed; %d of reports refused\n", time.Now().Format(time.TimeOnly), allowed, lost, refused)
		}
	}
}

// tellRotations prints the SVIDs that have been replaced since the last call.
func (d *demo) tellRotations(ctx context.Context, serials map[string]string) {
	s, err := d.askStatus(ctx)
	if err != nil {
		return // the next second asks again
	}
	for _, identity := range s.Agent.Identities {
		old := serials[identity.SPIFFEID]
		serials[identity.SPIFFEID] = identity.Serial
		if old != "" && old != identity.Serial {
			fmt.Fprintf(d.out, "  rotated      %-32s serial %s -> %s, lives %s\n", identity.SPIFFEID, short(old), short(identity.Serial), left(identity.NotAfter))
		}
	}
}

func left(t time.Time) time.Duration { return time.Until(t).Round(time.Second) }

// short is enough of a serial number to tell two apart.
func short(serial string) string {
	return serial[:min(8, len(serial))]
}
