package telemetry

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func fullRecord() Access {
	return Access{
		Time: time.Date(2026, 1, 2, 3, 4, 5, 678_901_000, time.UTC), Action: "request", Outcome: "failure", Reason: "no rule allows it",
		Duration: 1500 * time.Microsecond, Listener: "in", Direction: "inbound",
		From: "spiffe://example.org/a", To: "spiffe://example.org/b", Plaintext: true, WouldDeny: "no rule", Serial: "5fa1", Decision: "deny", Rule: "r", Shadow: []string{"s1", "s2"}, Limit: "l",
		Generation: 7, Closed: "policy", Source: "10.0.0.1:5000", Destination: "unix:/run/app.sock", BytesIn: 10, BytesOut: 20, Via: "10.0.0.9:6000", Port: 8443,
		TLSVersion: "1.3", Cipher: "TLS_AES_128_GCM_SHA256", ServerName: "b.example.org", Protocol: "h2",
		HTTP: &AccessHTTP{Method: "GET", Host: "b", Path: "/x", Status: 403, RequestID: "id", UserAgent: "curl"},
	}
}

func TestAccessJSON(t *testing.T) {
	full := fullRecord()
	const want = `{"@timestamp":"2026-01-02T03:04:05.678901Z","ecs.version":"8.17.0","event.action":"request","event.outcome":"failure",` +
		`"event.reason":"no rule allows it","event.duration":1500000,"narthex.listener":"in","narthex.direction":"inbound",` +
		`"narthex.from":"spiffe://example.org/a","narthex.to":"spiffe://example.org/b","narthex.plaintext":true,"narthex.decision":"deny","narthex.would_deny":"no rule","narthex.rule":"r",` +
		`"narthex.shadow":["s1","s2"],"narthex.limit":"l","narthex.policy.generation":7,"narthex.closed":"policy","narthex.peer.serial":"5fa1",` +
		`"source.address":"10.0.0.1:5000","source.ip":"10.0.0.1","source.port":5000,"source.bytes":10,"narthex.via":"10.0.0.9:6000","server.port":8443,` +
		`"destination.address":"unix:/run/app.sock","destination.bytes":20,"tls.version":"1.3","tls.cipher":"TLS_AES_128_GCM_SHA256",` +
		`"tls.next_protocol":"h2","tls.client.server_name":"b.example.org","http.request.method":"GET","http.request.id":"id",` +
		`"url.domain":"b","url.path":"/x","user_agent.original":"curl","http.response.status_code":403}`
	if got := string(full.AppendJSON(nil)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := string((&Access{}).AppendJSON(nil)); got != `{"@timestamp":"0001-01-01T00:00:00.000000Z","ecs.version":"8.17.0"}` {
		t.Errorf("empty record: %s", got)
	}
}

// TestAccessHasNoForgottenField fails when a field is added to Access and not
// to its encoding or its decoding.
func TestAccessHasNoForgottenField(t *testing.T) {
	full := fullRecord()
	v := reflect.ValueOf(full)
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("the test's record lacks %s", v.Type().Field(i).Name)
		}
	}
	var back Access
	if err := json.Unmarshal(full.AppendJSON(nil), &back); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, full) {
		t.Errorf("got  %+v\nwant %+v", back, full)
	}
	if err := json.Unmarshal([]byte(`{"event.duration":"long"}`), &back); err == nil {
		t.Error("a record of wrong types was read")
	}
}

func TestAccessText(t *testing.T) {
	full := fullRecord()
	want := `2026-01-02T03:04:05Z in inbound deny spiffe://example.org/a -> spiffe://example.org/b "GET /x" 403 rule=r source=10.0.0.1:5000 bytes=10/20 1.5ms "no rule allows it"`
	if got := string(full.AppendText(nil)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	silent := Access{Listener: "in", Direction: "inbound", Decision: "allow", HTTP: &AccessHTTP{}}
	if got := string(silent.AppendText(nil)); got != `0001-01-01T00:00:00Z in inbound allow - -> - - - rule=- source=- bytes=0/0 0s -` {
		t.Errorf("got %s", got)
	}
	early := Access{Listener: "in", Direction: "inbound", Reason: "no certificate"}
	if got := string(early.AppendText(nil)); got != `0001-01-01T00:00:00Z in inbound refused - -> - rule=- source=- bytes=0/0 0s "no certificate"` {
		t.Errorf("got %s", got)
	}
}

// FuzzAccess feeds what peers choose: names and reasons.
func FuzzAccess(f *testing.F) {
	f.Add("spiffe://example.org/a", "b.example", "10.0.0.1:1")
	f.Add("\x00\n\"\\\u2028\xff", "</script>", "[::1]:99999")
	f.Fuzz(func(t *testing.T, from, sni, source string) {
		a := Access{From: from, ServerName: sni, Source: source, Reason: from, Shadow: []string{sni}}
		line := a.AppendJSON(nil)
		if bytes.ContainsAny(line, "\n\r") {
			t.Fatalf("a record of two lines: %q", line)
		}
		var back Access
		if err := json.Unmarshal(line, &back); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if want := strings.ToValidUTF8(from, "\ufffd"); strings.ToValidUTF8(back.From, "\ufffd") != back.From || from == want && back.From != from {
			t.Fatalf("got %q, want %q", back.From, want)
		}
	})
}

// sink is a writer that fails while told to.
type sink struct {
	mu   sync.Mutex // guards the following
	data []byte
	fail error
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		n := len(p) / 2
		s.data = append(s.data, p[:n]...)
		return n, s.fail
	}
	s.data = append(s.data, p...)
	return len(p), nil
}

func (s *sink) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *sink) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.data)
}

func TestAccessLogFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &sink{}
		l, err := NewAccessLog(out, "json", nil)
		if err != nil {
			t.Fatal(err)
		}
		l.Write(&Access{Listener: "one"})
		if out.text() != "" {
			t.Error("the record was not batched")
		}
		time.Sleep(accessFlush + time.Millisecond) // the bubble's clock
		synctest.Wait()
		if got := out.text(); !strings.HasSuffix(got, `"narthex.listener":"one"}`+"\n") {
			t.Errorf("after the flush interval: %q", got)
		}
		l.Write(&Access{Listener: "two"})
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if got := out.text(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "two") {
			t.Errorf("after Close: %q", got)
		}
		l.Write(&Access{Listener: "late"})
		if err := l.Close(); !errors.Is(err, ErrLogClosed) || strings.Contains(out.text(), "late") {
			t.Errorf("a closed log: %v, %q", err, out.text())
		}
	})
}

// TestAccessLogOutlivesFailure has the disk full for a while.
func TestAccessLogOutlivesFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := errors.New("no space left on device")
		out := &sink{fail: full}
		l, err := NewAccessLog(out, "json", nil)
		if err != nil {
			t.Fatal(err)
		}
		l.Write(&Access{Listener: "lost"})
		time.Sleep(accessFlush + time.Millisecond) // the bubble's clock
		synctest.Wait()
		out.setFail(nil)
		l.Write(&Access{Listener: "kept"})
		if err := l.Close(); !errors.Is(err, full) {
			t.Errorf("Close hides the failure: %v", err)
		}
		lines := strings.Split(strings.TrimSpace(out.text()), "\n")
		var back Access
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &back); err != nil || back.Listener != "kept" {
			t.Errorf("the record after the failure: %q: %v", lines, err)
		}
	})
}

func TestAccessLogFormats(t *testing.T) {
	if _, err := NewAccessLog(&sink{}, "xml", nil); err == nil || !strings.Contains(err.Error(), "want json or text") {
		t.Errorf("got %v", err)
	}
	var none *AccessLog
	none.Write(&Access{})
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}

func TestAccessLogTogether(t *testing.T) {
	out := &sink{}
	l, err := NewAccessLog(out, "text", nil)
	if err != nil {
		t.Fatal(err)
	}
	const writers, records = 8, 500
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range records {
				l.Write(&Access{Listener: "in", Reason: "done"})
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(out.text(), "\n"), "\n")
	if len(lines) != writers*records {
		t.Fatalf("%d lines, want %d", len(lines), writers*records)
	}
	for _, line := range lines {
		if !strings.HasSuffix(line, ` "done"`) {
			t.Fatalf("a torn line: %q", line)
		}
	}
}

func BenchmarkAccessJSON(b *testing.B) {
	a := fullRecord()
	buf := a.AppendJSON(nil)
	b.ReportAllocs()
	for b.Loop() {
		buf = a.AppendJSON(buf[:0])
	}
}

// stalled is a reader that has stopped, like a full pipe.
type stalled struct{ release chan struct{} }

func (s stalled) Write(p []byte) (int, error) {
	<-s.release
	return len(p), nil
}

func TestAccessLogDoesNotWaitForItsReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		reader := stalled{make(chan struct{})}
		l, err := NewAccessLog(reader, "json", m)
		if err != nil {
			t.Fatal(err)
		}
		for range 20_000 { // some MiB
			l.Write(&Access{Listener: "inventory", Reason: "somebody who is not let in"})
		}
		dropped := m.Counter("narthex_access_log_dropped_total", "").With().Value()
		if dropped == 0 {
			t.Error("nothing was dropped, so all of it is in memory")
		}
		if err := l.Close(); !errors.Is(err, ErrLogStalled) {
			t.Errorf("Close: %v", err)
		}
		close(reader.release)
	})
}

func TestAccessIsHarmlessToWhoeverReadsIt(t *testing.T) {
	a := Access{ServerName: "a\u009b31m\x7f\u202e", From: strings.Repeat("x", 240_000)}
	line := string(a.AppendJSON(nil))
	if len(line) > 3*maxValue {
		t.Errorf("a record of %d bytes", len(line))
	}
	for _, r := range line {
		if r < ' ' || r == 0x7f || unicode.In(r, unicode.Cc, unicode.Cf) {
			t.Errorf("%U stands in the log as it came: %s", r, line)
		}
	}
	var back Access
	if err := json.Unmarshal([]byte(line), &back); err != nil || back.ServerName != a.ServerName {
		t.Errorf("read back %q, %v", back.ServerName, err)
	}
}
