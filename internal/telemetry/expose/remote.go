package expose

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Remote is the other half: a process that serves its own part on a private
// socket, the Config.Private of its Server.
type Remote struct {
	Process string // "agent" or "proxy"
	Socket  string // path
}

const (
	// remoteTimeout bounds how long a page waits for the other half.
	remoteTimeout = 2 * time.Second
	// maxRemote bounds what it may answer with.
	maxRemote = 16 << 20
	// maxReasons bounds how much of its reasons is passed on.
	maxReasons = 4 << 10
)

// client asks the other half.
type client struct {
	Remote
	http *http.Client
}

func newClient(r Remote) *client {
	return &client{r, &http.Client{
		Timeout: remoteTimeout,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", r.Socket)
			},
			MaxIdleConns:       2,
			IdleConnTimeout:    idleTimeout / 2, // before the server's, so that no request meets a closing connection
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// get asks for a path. The error of a status other than 200 holds the text
// that came with it.
func (c *client) get(ctx context.Context, path string, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("the %s does not answer: %w", c.Process, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxReasons))
		if err != nil {
			return fmt.Errorf("the %s does not answer: %w", c.Process, err)
		}
		return &refusal{resp.StatusCode, strings.TrimSpace(string(text))}
	}
	limited := &io.LimitedReader{R: resp.Body, N: maxRemote + 1}
	err = read(limited)
	if limited.N == 0 {
		return fmt.Errorf("the %s answered %s with more than %d bytes", c.Process, path, maxRemote)
	}
	if err != nil {
		return fmt.Errorf("read %s of the %s: %w", path, c.Process, err)
	}
	return nil
}

// refusal is an answer that is not 200.
type refusal struct {
	code int
	text string
}

func (r *refusal) Error() string {
	if r.text == "" {
		return http.StatusText(r.code)
	}
	return r.text
}

func (c *client) metrics(ctx context.Context) (families map[string]*dto.MetricFamily, err error) {
	err = c.get(ctx, "/metrics", func(r io.Reader) error {
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err = parser.TextToMetricFamilies(r)
		return err
	})
	if err != nil {
		return nil, err // half of a page is none
	}
	return families, nil
}

func (c *client) status(ctx context.Context) (st telemetry.Status, err error) {
	err = c.get(ctx, "/api/v1/status", func(r io.Reader) error {
		return json.NewDecoder(r).Decode(&st)
	})
	return st, err
}

func (c *client) ready(ctx context.Context) error {
	return c.get(ctx, "/readyz", func(io.Reader) error { return nil })
}
