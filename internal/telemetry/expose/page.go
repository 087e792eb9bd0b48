package expose

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed" // the page's parts are files of their own
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

var (
	//go:embed page.html
	pageHTML string
	//go:embed page.css
	pageCSS string
	//go:embed page.js
	pageJS []byte
)

// pagePolicy lets the page have its own style, known by its hash, and its own
// script, which asks for the page again: nothing else, from nowhere else.
var pagePolicy = func() string {
	sum := sha256.Sum256([]byte(pageCSS))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

var pageTemplate = template.Must(template.New("page").Parse(pageHTML))

// view is what the template shows.
type view struct {
	telemetry.Status
	Style      template.CSS
	Now        time.Time
	Problems   []problem
	Identities []identityView
}

// problem is one thing a person should look at, and where.
type problem struct{ Where, What string }

type identityView struct {
	telemetry.Identity
	Holder string // agent | proxy
	Left   float64
}

func script(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/javascript; charset=utf-8")
	_, _ = w.Write(pageJS) // a client that went away needs no answer
}

func (s *Server) page(w http.ResponseWriter, r *http.Request) {
	var out bytes.Buffer
	if err := pageTemplate.Execute(&out, newView(s.whole(r.Context()), time.Now())); err != nil {
		s.cfg.Log.Error("cannot make the status page", "error", err)
		http.Error(w, "cannot make the status page; see the log", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", pagePolicy)
	_, _ = w.Write(out.Bytes())
}

func newView(st telemetry.Status, now time.Time) *view {
	v := &view{Status: st, Style: template.CSS(pageCSS), Now: now} //nolint:gosec // G203: our own constant
	note := func(where, what string) {
		if what != "" {
			v.Problems = append(v.Problems, problem{where, what})
		}
	}
	if a := st.Agent; a != nil {
		note("agent", a.Problem)
		v.hold("agent", a.Identities)
	}
	if p := st.Proxy; p != nil {
		note("proxy", p.Problem)
		note("policy", p.Policy.Problem)
		if s := p.Sandbox; s != nil {
			if !s.On {
				note("sandbox", "off: whoever takes over the proxy has all the rights of its user")
			}
			for _, missing := range s.Missing {
				note("sandbox", "not in force: "+missing)
			}
		}
		for _, c := range p.CRLs {
			note("CRLs of "+c.TrustDomain, c.Problem)
			if !c.NextUpdate.IsZero() && now.After(c.NextUpdate) {
				note("CRL of "+c.Issuer, "out of date since "+c.NextUpdate.UTC().Format(time.RFC3339)+": new connections it would have to speak of are refused")
			}
		}
		for _, l := range p.Listeners {
			note("listener "+l.Name, l.Problem)
			for i := range l.Endpoints {
				if e := &l.Endpoints[i]; !e.Healthy {
					note("listener "+l.Name, "endpoint "+e.Where()+" is not healthy: "+cmp.Or(e.Problem, "no reason is known"))
				}
			}
		}
		for _, e := range p.ExtAuthz {
			note("ext_authz "+e.Name, e.Problem)
		}
		v.hold("proxy", p.Identities)
	}
	for _, id := range v.Identities {
		if !id.NotAfter.After(now) {
			note("identity "+id.SPIFFEID, "expired at "+id.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return v
}

func (v *view) hold(holder string, ids []telemetry.Identity) {
	for _, id := range ids {
		left := 0.0
		if whole := id.NotAfter.Sub(id.NotBefore); whole > 0 {
			left = min(max(float64(id.NotAfter.Sub(v.Now))/float64(whole), 0), 1)
		}
		v.Identities = append(v.Identities, identityView{id, holder, left})
	}
}

// Until returns the time left until t for a person.
func (v *view) Until(t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	if !t.After(v.Now) {
		return "expired"
	}
	return short(t.Sub(v.Now))
}

// Ago returns the time since t for a person.
func (v *view) Ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return short(max(v.Now.Sub(t), 0)) + " ago"
}

// Stamp returns t for machines, and for who wants it exactly.
func (v *view) Stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// short names the two largest units of a duration.
func short(d time.Duration) string {
	s := int64(d / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%d h %d min", s/3600, s%3600/60)
	}
	return fmt.Sprintf("%d d %d h", s/86400, s%86400/3600)
}
