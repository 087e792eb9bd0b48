package expose

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// publicRoutes shows both halves to people and monitoring.
func (s *Server) publicRoutes() http.Handler {
	mux := http.NewServeMux()
	gather := s.gatherer()
	if s.remote != nil {
		gather = s.merged(gather)
	}
	mux.Handle("/metrics", s.metricsHandler(gather))
	mux.HandleFunc("/api/v1/status", func(w http.ResponseWriter, r *http.Request) {
		writeStatus(w, s.whole(r.Context()))
	})
	mux.HandleFunc("/{$}", s.page)
	mux.HandleFunc("/status.js", script)
	s.addHealth(mux, true)
	return mux
}

// healthRoutes shows health alone.
func (s *Server) healthRoutes() http.Handler {
	mux := http.NewServeMux()
	s.addHealth(mux, true)
	return mux
}

// privateRoutes shows this process's own part to the other half. It never
// asks the other half in turn, or two of them would ask for ever.
func (s *Server) privateRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", s.metricsHandler(s.gatherer()))
	mux.HandleFunc("/api/v1/status", func(w http.ResponseWriter, _ *http.Request) {
		writeStatus(w, s.status())
	})
	s.addHealth(mux, false)
	return mux
}

func (s *Server) addHealth(mux *http.ServeMux, both bool) {
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		var reasons []string
		if s.cfg.Live != nil {
			reasons = reason(reasons, s.cfg.Process, s.cfg.Live())
		}
		writeHealth(w, reasons)
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		var reasons []string
		who := ""
		if both && s.remote != nil {
			who = s.cfg.Process // two halves: say which
		}
		if s.cfg.Ready != nil {
			reasons = reason(reasons, who, s.cfg.Ready())
		}
		if both && s.remote != nil {
			reasons = reason(reasons, s.remote.Process, s.remote.ready(r.Context()))
		}
		writeHealth(w, reasons)
	})
}

// reason adds the lines of an error, each with whose it is.
func reason(lines []string, who string, err error) []string {
	if err == nil {
		return lines
	}
	for line := range strings.SplitSeq(strings.TrimSpace(err.Error()), "\n") {
		if who != "" {
			line = who + ": " + line
		}
		lines = append(lines, line)
	}
	return lines
}

func writeHealth(w http.ResponseWriter, reasons []string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if len(reasons) > 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, strings.Join(reasons, "\n")+"\n") // as below
		return
	}
	_, _ = io.WriteString(w, "ok\n") // a client that went away needs no answer
}

// status returns what this process knows of itself.
func (s *Server) status() telemetry.Status {
	if s.cfg.Status == nil {
		return telemetry.Status{}
	}
	return s.cfg.Status()
}

// whole returns the status of both halves as one. A half that does not answer
// is there with the problem.
func (s *Server) whole(ctx context.Context) telemetry.Status {
	st := s.status()
	if s.remote == nil {
		return st
	}
	other, err := s.remote.status(ctx)
	if err == nil {
		if st.Agent == nil {
			st.Agent = other.Agent
		}
		if st.Proxy == nil {
			st.Proxy = other.Proxy
		}
		if st.TrustDomain == "" {
			st.TrustDomain = other.TrustDomain
		}
		return st
	}
	switch {
	case s.remote.Process == "agent" && st.Agent == nil:
		st.Agent = &telemetry.AgentStatus{Problem: err.Error()}
	case s.remote.Process == "proxy" && st.Proxy == nil:
		st.Proxy = &telemetry.ProxyStatus{Problem: err.Error(), Listeners: []telemetry.ListenerStatus{}}
	}
	return st
}

func writeStatus(w http.ResponseWriter, st telemetry.Status) {
	data, err := json.MarshalIndent(st, "", "  ")
	if err != nil { // cannot happen for a Status
		http.Error(w, "encode status: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(data, '\n')) // a client that went away needs no answer
}
