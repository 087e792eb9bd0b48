package proxy

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// both says what is the same towards services of either version.
func both(t *testing.T, f func(t *testing.T, p Protocol)) {
	t.Helper()
	for _, p := range []Protocol{ProtocolHTTP1, ProtocolHTTP2} {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			f(t, p)
		})
	}
}

const twoPaths = `version: 1
rules:
  - {id: a, effect: allow, from: ["spiffe://example.org/web"], http: {paths: ["/a/**"]}}
  - {id: b, effect: allow, from: ["spiffe://example.org/web"], http: {paths: ["/b/**"]}}
`

const onlyB = `version: 1
rules:
  - {id: b, effect: allow, from: ["spiffe://example.org/web"], http: {paths: ["/b/**"]}}
`

// A live stream that the rules refuse by now ends, and the others of its
// connection go on.
func TestStreamsAskedAgain(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		action Action
		lasts  bool // it outlives the change itself
		ends   bool
	}{{ActionClose, false, true}, {ActionDrain, true, true}, {ActionKeep, true, false}} {
		t.Run(test.action.String(), func(t *testing.T) {
			t.Parallel()
			left := make(chan string, 2)
			p, clients := calls(t, callee(t, func(_ any, s grpc.ServerStream) error {
				err := echoing(nil, s)
				method, _ := grpc.MethodFromServerStream(s)
				left <- method
				return err
			}), func(c *Config) {
				c.Policy = rulesOf(t, twoPaths)
				c.Listeners[0].OnPolicyChange = test.action
				c.Listeners[0].Timeouts.Drain = time.Second
			})
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			a, b := opens(t, ctx, clients["one"], "/a/echo"), opens(t, ctx, clients["one"], "/b/echo")
			for _, s := range []grpc.ClientStream{a, b} {
				if err := echoes1(s, "before"); err != nil {
					t.Fatal(err)
				}
			}
			applied := p.apply(onlyB)
			if closed := applied.Closed == 1; closed == test.lasts || (applied.Kept == 1) != test.lasts {
				t.Errorf("applied %+v", applied)
			}
			if test.lasts {
				if err := echoes1(a, "after"); err != nil {
					t.Error(err)
				}
			}
			if test.ends {
				if err := a.RecvMsg(message("")); status.Code(err) != codes.PermissionDenied {
					t.Errorf("the stream that is refused: %v", err)
				}
				if method := <-left; method != "/a/echo" {
					t.Errorf("ended %s", method)
				}
				if r := p.next(); r.HTTP.Path != "/a/echo" || r.Closed != "policy" || r.HTTP.Status != 200 {
					t.Errorf("record %+v %+v", r, r.HTTP)
				}
			}
			if err := echoes1(b, "after"); err != nil {
				t.Error(err)
			}
			if err := clients["one"].Invoke(ctx, "/a/echo", message("x"), message("")); status.Code(err) != codes.PermissionDenied {
				t.Errorf("a new one: %v", err)
			}
		})
	}
}

// trickles sends a part of a response and waits.
func trickles(begun chan<- struct{}, gone chan<- struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "part")
		w.(http.Flusher).Flush()
		begun <- struct{}{}
		<-r.Context().Done()
		gone <- struct{}{}
	}
}

// A response that is not whole ends with a reset.
func TestStreamEndedByRules(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		begun, gone := make(chan struct{}, 2), make(chan struct{}, 2)
		p, ca := web(t, origin(t, trickles(begun, gone)), speaking(protocol), func(c *Config) { c.Policy = rulesOf(t, twoPaths) })
		f := framedClient(t, p.addr("web"), ca)
		f.asks(1, true, "GET", "/a/x")
		<-begun
		f.content(1)
		f.asks(3, true, "GET", "/b/x")
		<-begun
		f.content(3)
		p.apply(onlyB)
		if a := f.answer(1); a.status != "200" || a.body != "" || a.reset != http2.ErrCodeCancel {
			t.Errorf("%+v", a)
		}
		<-gone
		f.must(f.WriteRSTStream(3, http2.ErrCodeCancel))
		<-gone
		for range 2 {
			if r := p.next(); r.HTTP.Status != 200 || r.BytesOut != 4 || r.Closed != map[string]string{"/a/x": "policy", "/b/x": "peer"}[r.HTTP.Path] {
				t.Errorf("record %+v %+v", r, r.HTTP)
			}
		}
	})
}

// How clients leave in the midst, and what of it the service and the record see.
func TestClientsLeaveStreams(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		begun, gone := make(chan struct{}, 1), make(chan struct{}, 1)
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/late") {
				begun <- struct{}{}
				<-r.Context().Done()
				gone <- struct{}{}
				return
			}
			trickles(begun, gone)(w, r)
		}), speaking(protocol))
		f := framedClient(t, p.addr("web"), ca)
		f.asks(1, true, "GET", "/v1/late")
		<-begun
		f.must(f.WriteRSTStream(1, http2.ErrCodeCancel))
		<-gone
		if r := p.next(); r.HTTP.Status != statusLeft || r.Closed != "peer" || !strings.Contains(r.Reason, "before the response") {
			t.Errorf("record %+v %+v", r, r.HTTP)
		}
		f.asks(3, true, "POST", "/v1/soon")
		<-begun
		f.content(3)
		_ = f.Close()
		<-gone
		if r := p.next(); r.HTTP.Status != 200 || !strings.Contains(r.Reason, "went away within") {
			t.Errorf("record %+v %+v", r, r.HTTP)
		}
	})
}

// What services do with streams, and what their clients see of it.
func TestServicesEndStreams(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		handle   func(f *framed, tries int, head *http2.MetaHeadersFrame)
		want     framedAnswer
		tries    int
		body     bool
		trailers string
	}{
		{name: "refused once", handle: func(f *framed, tries int, head *http2.MetaHeadersFrame) {
			if tries == 1 {
				_ = f.WriteRSTStream(head.StreamID, http2.ErrCodeRefusedStream)
				return
			}
			f.sends(head.StreamID, true, ":status:204")
		}, want: framedAnswer{status: "204"}, tries: 2},
		{name: "goes away", handle: func(f *framed, tries int, head *http2.MetaHeadersFrame) {
			if tries == 1 {
				_ = f.WriteGoAway(head.StreamID-1, http2.ErrCodeNo, nil)
				return
			}
			f.sends(head.StreamID, true, ":status:204")
		}, want: framedAnswer{status: "204"}, tries: 2},
		{name: "refused with its body", body: true, handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			for {
				frame, err := f.next()
				if err != nil {
					return
				}
				if d, ok := frame.(*http2.DataFrame); ok && d.StreamEnded() {
					break
				}
			}
			_ = f.WriteRSTStream(head.StreamID, http2.ErrCodeRefusedStream)
		}, want: framedAnswer{status: "502"}, tries: 1},
		{name: "reset", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			_ = f.WriteRSTStream(head.StreamID, http2.ErrCodeInternal)
		}, want: framedAnswer{status: "502"}, tries: 1},
		{name: "reset within", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, false, ":status:200")
			_ = f.WriteData(head.StreamID, false, []byte("part"))
			_ = f.WriteRSTStream(head.StreamID, http2.ErrCodeCancel)
		}, want: framedAnswer{status: "200", body: "part", reset: http2.ErrCodeInternal, wasReset: true}, tries: 1},
		{name: "cut within", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, false, ":status:200")
			_ = f.WriteData(head.StreamID, false, []byte("part"))
			_ = f.Close()
		}, want: framedAnswer{status: "200", body: "part", reset: http2.ErrCodeInternal, wasReset: true}, tries: 1},
		{name: "less than its length", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, false, ":status:200", "content-length:9")
			_ = f.WriteData(head.StreamID, true, []byte("part"))
		}, want: framedAnswer{status: "200", reset: http2.ErrCodeInternal, wasReset: true}, tries: 1},
		{name: "before the request's end", body: true, handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, false, ":status:200")
			_ = f.WriteData(head.StreamID, true, []byte("early"))
			_ = f.WriteRSTStream(head.StreamID, http2.ErrCodeNo)
		}, want: framedAnswer{status: "200", body: "early"}, tries: 1},
		{name: "interim, trailers", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, false, ":status:103", "link:</a>")
			f.sends(head.StreamID, false, ":status:200")
			_ = f.WriteData(head.StreamID, false, []byte("all"))
			f.sends(head.StreamID, true, "x-sum:3")
		}, want: framedAnswer{status: "103 200", body: "all"}, tries: 1, trailers: "3"},
		{name: "empty end", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, false, ":status:200")
			_ = f.WriteData(head.StreamID, false, []byte("all"))
			_ = f.WriteData(head.StreamID, true, nil)
		}, want: framedAnswer{status: "200", body: "all"}, tries: 1},
		{name: "not modified", handle: func(f *framed, _ int, head *http2.MetaHeadersFrame) {
			f.sends(head.StreamID, true, ":status:304", "content-length:9")
		}, want: framedAnswer{status: "304"}, tries: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			tries := 0
			p, ca := web(t, framedService(t, func(f *framed) {
				for {
					head := f.request()
					if head == nil {
						return
					}
					mu.Lock()
					tries++
					n := tries
					mu.Unlock()
					test.handle(f, n, head)
				}
			}), speaking(ProtocolHTTP2))
			f := framedClient(t, p.addr("web"), ca)
			f.asks(1, !test.body, "POST", "/v1/a")
			if test.body {
				f.must(f.WriteData(1, false, []byte("some")))
				if test.tries == 1 && test.want.status == "502" {
					f.must(f.WriteData(1, true, nil))
				}
			}
			a := f.answer(1)
			want := test.want
			if want.status == "502" {
				a.body = ""
			}
			if a.status != want.status || a.body != want.body || a.reset != want.reset || a.wasReset != want.wasReset || a.trailers["x-sum"] != test.trailers {
				t.Errorf("%+v, want %+v", a, want)
			}
			r := p.next()
			if failed := want.wasReset || want.status == "502"; r.HTTP == nil || (r.Outcome == "failure") != failed || int(r.BytesOut) != len(want.body) {
				t.Errorf("record %+v %+v", r, r.HTTP)
			}
			mu.Lock()
			defer mu.Unlock()
			if tries != test.tries {
				t.Errorf("%d tries", tries)
			}
		})
	}
}

// The end of a request without a length may come in a frame of its own, before
// or after its service is there, and with trailers.
func TestEndsOfRequests(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		begun := make(chan struct{}, 1)
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v1/begun" {
				begun <- struct{}{}
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			_, _ = io.WriteString(w, string(body)+r.Trailer.Get("x-sum"))
		}), speaking(protocol))
		f := framedClient(t, p.addr("web"), ca)
		for n, end := range []func(stream uint32){
			func(stream uint32) { f.must(f.WriteData(stream, true, nil)) },
			func(stream uint32) { f.sends(stream, true, "x-sum:!") },
			func(stream uint32) {
				f.must(f.WriteData(stream, false, []byte("more")))
				f.must(f.WriteData(stream, true, nil))
			},
			func(stream uint32) {
				f.must(f.WriteData(stream, false, []byte("more")))
				f.sends(stream, true, "x-sum:!")
			},
		} {
			want := []string{"", "!", "more", "more!"}[n]
			for m, path := range []string{"/v1/a", "/v1/begun"} {
				stream := uint32(4*n + 2*m + 1)
				f.asks(stream, false, "POST", path, "trailer:x-sum")
				if path == "/v1/begun" {
					<-begun
				}
				end(stream)
				if a := f.answer(stream); a.status != "200" || a.body != want {
					t.Errorf("%d: %+v, want %q", stream, a, want)
				}
			}
		}
	})
}
