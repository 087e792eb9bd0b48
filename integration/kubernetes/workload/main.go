// Command workload is what runs in the pods of the tests: a service, those who
// call it, and those who ask the Workload API who they are. What happens is
// written to standard output, one JSON object a line.
//
//	workload serve -listen 127.0.0.1:8080
//	workload call -url http://127.0.0.1:15001/ -every 20ms [-one]
//	workload watch            one stream of the Workload API, opened again when it ends
//	workload fetch -every 0   one fetch (0) or one after the other, each on a connection of its own
//	workload sleep
//	workload broker -at unix:///broker/broker.sock -agent spiffe://… -pod shop/web   one stream of the Broker API, about another pod
//	workload drive -control /control/control.sock -agents /workload-api [-first narthex]   as the benchmark says
//
// The Workload API is that of SPIFFE_ENDPOINT_SOCKET, but for drive, which is
// told of several.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"
)

// event is one line of output.
type event struct {
	Time   time.Time `json:"time"`
	Event  string    `json:"event"`            // ready, total, answer, failed, svids
	IDs    []string  `json:"ids,omitempty"`    // svids: the SPIFFE IDs, in the order of the answer
	Serial string    `json:"serial,omitempty"` // svids: of the first
	Body   string    `json:"body,omitempty"`   // answer: what the service said, when it is not what it said before
	Good   int       `json:"good,omitempty"`   // total: calls that were answered since the start
	Failed int       `json:"failed,omitempty"` // total: calls that were not
	Code   string    `json:"code,omitempty"`   // failed: of gRPC
	Reason string    `json:"reason,omitempty"` // failed: of the Broker API
	Error  string    `json:"error,omitempty"`
}

var output struct {
	mu sync.Mutex // guards the encoder
	to *json.Encoder
}

func say(e event) {
	e.Time = time.Now()
	output.mu.Lock()
	defer output.mu.Unlock()
	_ = output.to.Encode(e) // the log of a pod that is going away
}

func main() {
	start := time.Now()
	output.to = json.NewEncoder(os.Stdout)
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "want serve, call, watch, fetch, sleep, broker or drive")
		os.Exit(2)
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "address of the service")
	url := flags.String("url", "", "what is called")
	every := flags.Duration("every", 100*time.Millisecond, "time from one call to the next; 0: one call")
	timeout := flags.Duration("timeout", 5*time.Second, "time a call may take")
	one := flags.Bool("one", false, "all calls go over one connection, for as long as it lives")
	control := flags.String("control", "", "socket of the benchmark")
	agents := flags.String("agents", "", "folder with a folder for each agent, of api.sock")
	first := flags.String("first", "", "agent that is asked before all else")
	var whom brokered
	flags.StringVar(&whom.at, "at", "", "where the Broker API is, as gRPC has it")
	flags.StringVar(&whom.agent, "agent", "", "SPIFFE ID of the agent that is there")
	flags.StringVar(&whom.pod, "pod", "", "namespace/name of the pod that a broker asks for")
	flags.StringVar(&whom.uid, "uid", "", "UID of that pod")
	flags.IntVar(&whom.pid, "pid", 0, "the process that a broker asks for")
	_ = flags.Parse(os.Args[2:]) // exits
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()

	var err error
	switch flags.Name() {
	case "serve":
		err = serve(ctx, *listen)
	case "call":
		err = repeat(ctx, *every, *timeout, caller(*url, *one))
	case "watch":
		err = workloadapi.WatchX509Context(ctx, watcher{})
	case "fetch":
		err = repeat(ctx, *every, *timeout, fetch)
	case "sleep":
		say(event{Event: "ready"})
		<-ctx.Done()
	case "broker":
		err = whom.subscribe(ctx)
	case "drive":
		err = drive(ctx, *control, *agents, *first, start)
	default:
		err = fmt.Errorf("unknown command %q", flags.Name())
	}
	if err != nil && ctx.Err() == nil {
		say(event{Event: "failed", Code: status.Code(err).String(), Reason: reasonOf(err), Error: err.Error()})
		stop()
		os.Exit(1) //nolint:gocritic // stop has been called
	}
}

// serve answers every request with the name of its pod.
func serve(ctx context.Context, address string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	answer := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) }
	s := &http.Server{Addr: address, ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(answer)}
	var stopping sync.WaitGroup
	defer stopping.Wait()
	stopping.Go(func() { <-ctx.Done(); _ = s.Close() })
	say(event{Event: "ready"})
	return s.ListenAndServe()
}

// repeat calls again and again, and says how many calls went well and which
// did not.
func repeat(ctx context.Context, every, timeout time.Duration, call func(context.Context) error) error {
	attempt := func() error {
		limited, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return call(limited)
	}
	if every == 0 {
		return attempt()
	}
	calls := time.NewTicker(every)
	defer calls.Stop()
	totals := time.NewTicker(500 * time.Millisecond)
	defer totals.Stop()
	var good, failed int
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-totals.C:
			say(event{Event: "total", Good: good, Failed: failed})
		case <-calls.C:
			err := attempt()
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				failed++
				told = nil // what comes next is news
				say(event{Event: "failed", Code: status.Code(err).String(), Error: err.Error()})
			default:
				good++
			}
		}
	}
}

// caller returns what calls a service. A body that cannot be sent again keeps
// the client from trying again by itself.
func caller(url string, one bool) func(context.Context) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: !one}}
	var before string
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, io.NopCloser(strings.NewReader("who are you?")))
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, body)
		}
		if err == nil && string(body) != before {
			before = string(body)
			say(event{Event: "answer", Body: before})
		}
		return err
	}
}

// fetch asks once, on a connection of its own.
func fetch(ctx context.Context) error {
	svids, err := workloadapi.FetchX509SVIDs(ctx)
	if err == nil {
		saySVIDs(svids)
	}
	return err
}

var told []string // serials of the SVIDs that were told of

// saySVIDs tells of SVIDs, unless it has told of the same just before.
func saySVIDs(svids []*x509svid.SVID) {
	serials := make([]string, len(svids))
	e := event{Event: "svids"}
	for i, s := range svids {
		serials[i] = s.Certificates[0].SerialNumber.Text(16)
		e.IDs = append(e.IDs, s.ID.String())
	}
	if slices.Equal(serials, told) {
		return
	}
	told, e.Serial = serials, serials[0]
	say(e)
}

// watcher implements workloadapi.X509ContextWatcher.
type watcher struct{}

func (watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { saySVIDs(c.SVIDs) }

func (watcher) OnX509ContextWatchError(err error) {
	told = nil // what comes next is news
	say(event{Event: "failed", Code: status.Code(err).String(), Error: err.Error()})
}
