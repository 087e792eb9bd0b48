package stage

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// Face is what a running Narthex shows of itself: its figures and its access
// log.
type Face struct {
	name string
	dir  string
	t    testing.TB
}

// NewFace returns the face of a Narthex that makes its sockets and writes its
// access log in dir.
func NewFace(t testing.TB, name, dir string) *Face { return &Face{name, dir, t} }

// Figures is the socket of its telemetry.
func (f *Face) Figures() string { return filepath.Join(f.dir, "figures.sock") }

// AccessFile is its access log.
func (f *Face) AccessFile() string { return filepath.Join(f.dir, "access.log") }

// YAML is the part of narthex.yaml that makes it so.
func (f *Face) YAML() string {
	return fmt.Sprintf("telemetry: {listen: %q}\naccess_log: {path: %s}\n", "unix:"+f.Figures(), f.AccessFile())
}

// Get asks for a page.
func (f *Face) Get(page string) (code int, body string, err error) {
	var dialer net.Dialer
	client := &http.Client{
		Timeout: Soon,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, "unix", f.Figures())
			},
		},
	}
	resp, err := client.Get("http://localhost" + page)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data), err
}

// Ready is nil when it can do its work.
func (f *Face) Ready() error {
	code, body, err := f.Get("/readyz")
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%d %s", code, body)
	}
	return err
}

// Status returns the status document.
func (f *Face) Status() (telemetry.Status, error) {
	var s telemetry.Status
	code, body, err := f.Get("/api/v1/status")
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("status: %d %s", code, body)
	}
	if err == nil {
		err = json.Unmarshal([]byte(body), &s)
	}
	return s, err
}

// Becomes waits until the status document is as ok wants it.
func (f *Face) Becomes(within time.Duration, what string, ok func(telemetry.Status) bool) {
	f.t.Helper()
	Eventually(f.t, within, f.name+": "+what, func() error {
		s, err := f.Status()
		if err == nil && !ok(s) {
			text, _ := json.Marshal(s)
			err = fmt.Errorf("status is %s", text)
		}
		return err
	})
}

// Metric returns the value of one line of the metrics, 0 where it is not
// there.
func (f *Face) Metric(series string) float64 {
	f.t.Helper()
	_, body, err := f.Get("/metrics")
	if err != nil {
		f.t.Fatal(err)
	}
	for line := range strings.SplitSeq(body, "\n") {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				f.t.Fatalf("metric %q: %v", line, err)
			}
			return v
		}
	}
	return 0
}

// Records returns the access log.
func (f *Face) Records() []telemetry.Access {
	f.t.Helper()
	file, err := os.Open(f.AccessFile())
	if err != nil {
		f.t.Fatal(err)
	}
	defer file.Close()
	var all []telemetry.Access
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var a telemetry.Access
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			break // the last line, half written
		}
		all = append(all, a)
	}
	return all
}

// Record waits for an access record that is as ok wants it. It looks at
// those after the first skip ones.
func (f *Face) Record(skip int, what string, ok func(telemetry.Access) bool) telemetry.Access {
	f.t.Helper()
	var found telemetry.Access
	Eventually(f.t, Soon, f.name+" has an access record: "+what, func() error {
		all := f.Records()
		all = all[min(skip, len(all)):]
		at := slices.IndexFunc(all, ok)
		if at < 0 {
			return fmt.Errorf("there are %d others: %+v", len(all), all[max(0, len(all)-3):])
		}
		found = all[at]
		return nil
	})
	return found
}
