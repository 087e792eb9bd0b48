package endpoint

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/narthex-id/narthex/attestor"
)

// Explanation is what the agent knows of a process, and why that entitles it to
// what it gets, or to nothing. It holds no keys.
type Explanation struct {
	PID int    `json:"pid"`
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`

	Attestors []AttestorFinding `json:"attestors"`
	// Problem is why the process was not attested at all; empty where it was.
	Problem string `json:"problem,omitempty"`

	// Matched are the entries it matches, at most maxMatched of MatchedCount.
	Matched      []MatchedEntry `json:"matched"`
	MatchedCount int            `json:"matched_count"`
	// Nearest are those it fails to match by least.
	Nearest []NearEntry `json:"nearest"`

	Server ServerState `json:"server"`
}

// AttestorFinding is what one attestor made of the process.
type AttestorFinding struct {
	Type      string   `json:"type"`
	Selectors []string `json:"selectors"` // with the type before each
	Seconds   float64  `json:"seconds"`   // how long it took
	Problem   string   `json:"problem,omitempty"`
}

// MatchedEntry is an entry whose selectors the process all has.
type MatchedEntry struct {
	ID        string    `json:"entry_id"`
	SPIFFEID  string    `json:"spiffe_id"`
	Hint      string    `json:"hint,omitempty"`
	Selectors []string  `json:"selectors"`
	ExpiresAt time.Time `json:"expires_at,omitzero"` // of its X.509-SVID; zero: none is signed
	Problem   string    `json:"problem,omitempty"`   // why the last signing failed
}

// NearEntry is an entry that the process lacks selectors of.
type NearEntry struct {
	ID        string   `json:"entry_id"`
	SPIFFEID  string   `json:"spiffe_id"`
	Selectors []string `json:"selectors"`
	Missing   []string `json:"missing"`
}

// ServerState is how current the entries are that the agent knows.
type ServerState struct {
	Address   string    `json:"address"`
	Synced    bool      `json:"synced"` // since the agent started
	LastSync  time.Time `json:"last_sync,omitzero"`
	Reachable bool      `json:"reachable"`
	Entries   int       `json:"entries"`
	Problem   string    `json:"problem,omitempty"`
}

// Bounds of an explanation.
const (
	maxMatched = 100
	maxNearest = 10
)

// explainer answers for any process, to root and to the agent's own user:
// registrations of others are none of anybody else's business.
type explainer struct {
	server *Server
	agent  AdminAgent
}

// explainMethod is the one method of explainService.
const explainMethod = "ExplainProcess"

// explainService is a service without a message of its own: a PID in, JSON out.
var explainService = grpc.ServiceDesc{
	ServiceName: "narthex.agent.v1.Explain",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: explainMethod,
		Handler: func(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			var pid wrapperspb.Int32Value
			if err := decode(&pid); err != nil {
				return nil, err
			}
			return srv.(*explainer).explainProcess(ctx, int(pid.GetValue()))
		},
	}},
	Metadata: explainFile.Path(),
}

// explainFile describes the service to clients that ask for reflection.
var explainFile = func() protoreflect.FileDescriptor {
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("narthex/agent/v1/explain.proto"), Package: proto.String("narthex.agent.v1"), Syntax: proto.String("proto3"),
		Dependency: []string{"google/protobuf/struct.proto", "google/protobuf/wrappers.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{
			Name: proto.String("Explain"),
			Method: []*descriptorpb.MethodDescriptorProto{{
				Name:      proto.String(explainMethod),
				InputType: proto.String(".google.protobuf.Int32Value"), OutputType: proto.String(".google.protobuf.Struct"),
			}},
		}},
	}, protoregistry.GlobalFiles)
	if err == nil {
		err = protoregistry.GlobalFiles.RegisterFile(file)
	}
	if err != nil {
		panic(err) // a mistake in the program
	}
	return file
}()

// Explain asks the agent behind conn, a connection to its admin socket, for what
// it knows of a process. The error is a gRPC status.
func Explain(ctx context.Context, conn grpc.ClientConnInterface, pid int32) (*Explanation, error) {
	var answer structpb.Struct
	if err := conn.Invoke(ctx, "/"+explainService.ServiceName+"/"+explainMethod, wrapperspb.Int32(pid), &answer); err != nil {
		return nil, err
	}
	data, err := protojson.Marshal(&answer)
	if err != nil {
		return nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	var e Explanation
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	return &e, nil
}

func (x *explainer) explainProcess(ctx context.Context, pid int) (*structpb.Struct, error) {
	c := connOf(ctx)
	if own := os.Geteuid(); c.process.UID != 0 && int(c.process.UID) != own {
		return nil, status.Errorf(codes.PermissionDenied, "uid %d may not ask about other processes: ask as root or as the agent's user (uid %d)", c.process.UID, own)
	}
	process, err := pinFor(pid)
	if err != nil {
		return nil, err
	}
	defer process.Close()
	e := &Explanation{PID: process.PID, UID: process.UID, GID: process.GID, Matched: []MatchedEntry{}, Nearest: []NearEntry{}}
	selectors, err := x.attest(ctx, c, process, e)
	if err != nil {
		return nil, err
	}
	for _, m := range x.agent.Matching(selectors) {
		if e.MatchedCount++; e.MatchedCount > maxMatched {
			continue
		}
		matched := MatchedEntry{ID: m.Entry.ID, SPIFFEID: m.Entry.SPIFFEID.String(), Hint: m.Entry.Hint, Selectors: texts(m.Entry.Selectors)}
		if m.SVID != nil {
			matched.ExpiresAt = m.SVID.NotAfter
		}
		if m.Err != nil {
			matched.Problem = m.Err.Error()
		}
		e.Matched = append(e.Matched, matched)
	}
	for _, near := range x.agent.Nearest(selectors, maxNearest) {
		e.Nearest = append(e.Nearest, NearEntry{
			ID: near.Entry.ID, SPIFFEID: near.Entry.SPIFFEID.String(), Selectors: texts(near.Entry.Selectors), Missing: texts(near.Missing),
		})
	}
	s := x.agent.Status()
	e.Server = ServerState{
		Address: s.Server, Synced: x.agent.Unready() == nil, LastSync: s.LastSync, Reachable: s.Reachable, Entries: s.Entries, Problem: s.Problem,
	}
	return structOf(e)
}

// attest attests the process for an explanation, which notes what each attestor
// found and how long that took.
func (x *explainer) attest(ctx context.Context, c *conn, p *attestor.Process, e *Explanation) ([]attestor.Selector, error) {
	end, err := x.server.limits.beginAttestation(ctx, c.user)
	if err != nil {
		return nil, err
	}
	defer end()
	bounded, cancel := context.WithTimeout(ctx, x.server.limits.AttestationTime)
	defer cancel()
	selectors, err := attestor.AttestObserved(bounded, p, x.server.attestors, func(o attestor.Outcome) {
		f := AttestorFinding{Type: o.Type, Seconds: o.Duration.Seconds(), Selectors: []string{}}
		if o.Err != nil {
			f.Problem = o.Err.Error()
		}
		e.Attestors = append(e.Attestors, f)
	})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		e.Problem = err.Error()
	}
	for i := range e.Attestors {
		f := &e.Attestors[i]
		f.Selectors = append(f.Selectors, texts(slices.DeleteFunc(slices.Clone(selectors), func(s attestor.Selector) bool { return s.Type != f.Type }))...)
	}
	return selectors, nil
}

// texts shows selectors as the log does, of so many bytes each.
func texts(selectors []attestor.Selector) []string {
	shown := make([]string, 0, len(selectors))
	for _, s := range selectors {
		shown = append(shown, fmt.Sprintf("%.*s", maxShownLength, s))
	}
	return shown
}

func structOf(e *Explanation) (*structpb.Struct, error) {
	data, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode the explanation: %w", err)
	}
	var s structpb.Struct
	if err := protojson.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("encode the explanation: %w", err)
	}
	return &s, nil
}
