package endpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/narthex-id/narthex/agent/registry"
)

// SDS says how Envoys are served. A name that is empty has its default; names
// must differ, and none may be a SPIFFE ID.
type SDS struct {
	// DefaultSVIDName is the resource name of a caller's first SVID in the order
	// of entries: "default".
	DefaultSVIDName string
	// DefaultBundleName is that of the own trust domain's bundle: "ROOTCA".
	DefaultBundleName string
	// DefaultAllBundlesName is that of all bundles the caller may verify peers
	// with, each for its own trust domain: "ALL".
	DefaultAllBundlesName string
	// DisableSPIFFECertValidation sends bundles as a trusted_ca rather than as
	// the configuration of Envoy's SPIFFE validator. An Envoy may say otherwise
	// in the metadata of its node, as disable_spiffe_cert_validation.
	DisableSPIFFECertValidation bool
}

func (c SDS) withDefaults() SDS {
	c.DefaultSVIDName = cmp.Or(c.DefaultSVIDName, "default")
	c.DefaultBundleName = cmp.Or(c.DefaultBundleName, "ROOTCA")
	c.DefaultAllBundlesName = cmp.Or(c.DefaultAllBundlesName, "ALL")
	return c
}

// secretType is what SDS serves.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

func isSDS(method string) bool {
	return strings.HasPrefix(method, "/"+secretservice.SecretDiscoveryService_ServiceDesc.ServiceName+"/")
}

// secretAPI is Envoy's secret discovery service, version 3, as the xDS protocol
// has it. docs/design/0023-sds.md says what it does where that leaves a choice.
type secretAPI struct {
	secretservice.UnimplementedSecretDiscoveryServiceServer
	server *Server

	stream, delta, fetch *encoder // of which only where a caller stands is used
}

func newSecretAPI(s *Server) *secretAPI {
	stands := secretStanding(s.secrets.anonymous)
	return &secretAPI{
		server: s,
		stream: &encoder{method: "StreamSecrets", standing: stands, waits: true},
		delta:  &encoder{method: "DeltaSecrets", standing: stands, waits: true},
		fetch:  &encoder{method: "FetchSecrets", standing: stands},
	}
}

// secretStanding is where a caller stands who wants secrets. With an entry it
// is given what there is, and the rest when that is there.
func secretStanding(allowUnauthenticated bool) func(*registry.View) standing {
	return func(v *registry.View) standing {
		switch stands := standingOf(v); {
		case stands == unsynced, stands == denied && !allowUnauthenticated:
			return stands
		}
		return entitled
	}
}

// StreamSecrets answers each change with all that the client asked for.
func (a *secretAPI) StreamSecrets(stream secretservice.SecretDiscoveryService_StreamSecretsServer) error {
	return a.serve(stream, stateOfTheWorld{}, a.stream)
}

// DeltaSecrets answers each change with what changed.
func (a *secretAPI) DeltaSecrets(stream secretservice.SecretDiscoveryService_DeltaSecretsServer) error {
	return a.serve(stream, incremental{}, a.delta)
}

// FetchSecrets answers once, with what there is of what the client asked for.
// It fails with NotFound where that is nothing.
func (a *secretAPI) FetchSecrets(ctx context.Context, req *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	c := a.call(ctx, stateOfTheWorld{}, a.fetch)
	if err := c.heed(req); err != nil {
		return nil, err
	}
	view, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer c.end()
	set := a.server.secrets.acquire(secretKey{unexpired(view, time.Now()), c.rootsOnly})
	defer a.server.secrets.release(set)
	wanted := c.subscription.wanted(set)
	if len(wanted) == 0 {
		return nil, status.Errorf(codes.NotFound, "the caller has none of the %d resources that it names; StreamSecrets sends them when they are there", len(c.subscription.known))
	}
	response := &discovery.DiscoveryResponse{VersionInfo: versionOfAll(wanted).String(), TypeUrl: secretType}
	for _, x := range wanted {
		message := a.server.secrets.message(set, x)
		response.Resources = append(response.Resources, &anypb.Any{TypeUrl: secretType, Value: message.Materialize()})
	}
	if err := c.alive(); err != nil {
		return nil, err
	}
	return response, nil
}

// request is what both kinds of streams have in their requests.
type request interface {
	proto.Message
	GetNode() *core.Node
	GetTypeUrl() string
	GetResponseNonce() string
	GetErrorDetail() *rpc.Status
}

// dialect is one of the two kinds of streams that xDS has.
type dialect interface {
	// newRequest returns a message to receive into.
	newRequest() request
	// subscribe changes what the client asks for. current says that the request
	// is the stream's first, or that its nonce is that of the last answer.
	subscribe(s *subscription, r request, first, current bool) error
	// answer makes an answer, without its nonce.
	answer(c *secretCall, set *secretSet, news []*secret, gone []string) mem.BufferSlice
}

// secretCall is one call of SDS. It belongs to the goroutine of the call.
type secretCall struct {
	*caller
	dialect   dialect
	rootsOnly bool // see secretKey

	subscription subscription
	asked        bool       // there has been a request
	denied       bool       // no entry matches, and the log says so
	set          *secretSet // what the newest view gives, nil before the first
	sent         uint64     // answers; the nonce of the last
	rejected     uint64     // nonce of the last of them that the client rejected
	version      version    // of the last answer
}

func (a *secretAPI) call(ctx context.Context, d dialect, e *encoder) *secretCall {
	return &secretCall{
		caller:  &caller{server: a.server, subject: &connOf(ctx).subject, encoder: e},
		dialect: d, rootsOnly: a.server.secrets.sds.DisableSPIFFECertValidation,
	}
}

// serve answers a client for as long as it stays. It returns the status that
// ends the stream.
func (a *secretAPI) serve(stream grpc.ServerStream, d dialect, e *encoder) error {
	ctx := stream.Context()
	c := a.call(ctx, d, e)
	first := d.newRequest()
	if err := stream.RecvMsg(first); err != nil {
		return ended(err)
	}
	var view *registry.View
	err := c.server.deep.do(func() (err error) {
		if err := c.heed(first); err != nil {
			return err
		}
		ctx, free := c.server.tie(ctx)
		defer free()
		view, err = c.begin(ctx)
		return err
	})
	if err != nil {
		return err
	}
	defer c.end()
	if !c.server.held.add(c.watch) {
		c.watch.Close() // the one answer that is there, and no more
	}
	defer func() { a.server.secrets.release(c.set) }()
	c.denied = e.standing(view) == denied // which begin has told
	in := receive(stream, d)
	for {
		view = unexpired(view, time.Now())
		if err := c.server.deep.do(func() error { return c.turn(stream, view) }); err != nil {
			return err
		}
		next, err := c.nextWithin(ctx, in.came)
		switch {
		case err == nil:
			view = next
		case errors.Is(err, context.Canceled) && in.came.Err() != nil:
			if err := <-in.end; err != nil {
				return ended(err)
			}
			if err := c.server.deep.do(func() error { return c.heed(in.request) }); err != nil {
				return err
			}
			in = receive(stream, d)
		default:
			return err
		}
	}
}

// ended is the status of a stream on which no request can be received any more.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil // the client has hung up, and wants no more
	}
	return err
}

// incoming is a request that is waited for. The one who waits is a goroutine of
// its own for each, so that its stack never had to decode one; it ends with the
// stream at the latest.
type incoming struct {
	request request
	end     chan error      // of the wait; holds one
	came    context.Context // ends with the wait. Not a child of the stream's: those have a list of them in memory
}

func receive(stream grpc.ServerStream, d dialect) incoming {
	came, tell := context.WithCancel(context.Background())
	in := incoming{request: d.newRequest(), end: make(chan error, 1), came: came}
	go func() {
		in.end <- stream.RecvMsg(in.request)
		tell()
	}()
	return in
}

// heed takes in a request.
func (c *secretCall) heed(r request) error {
	if url := r.GetTypeUrl(); url != "" && url != secretType {
		return status.Errorf(codes.InvalidArgument, "resources of type %.200q are asked for; SDS serves %q alone", url, secretType)
	}
	if node := r.GetNode(); node != nil {
		c.rootsOnly = wantsRoots(node, c.server.secrets.sds.DisableSPIFFECertValidation)
	}
	nonce, _ := strconv.ParseUint(r.GetResponseNonce(), 10, 64)
	if problem := r.GetErrorDetail(); problem != nil && c.rejected < nonce && nonce <= c.sent {
		c.rejected = nonce
		args := []any{"method", c.encoder.method, "error", fmt.Sprintf("%.200q", problem.GetMessage())}
		if nonce == c.sent {
			args = append(args, "version", c.version)
		}
		c.server.note(c.subject, "the client rejects its secrets, and keeps those it had", args...)
	}
	first := !c.asked
	c.asked = true
	return c.dialect.subscribe(&c.subscription, r, first, first || nonce == c.sent)
}

// wantsRoots tells whether an Envoy wants bundles without the validator of
// SPIFFE: it says so, or is older than 1.18, which has none that could be used.
func wantsRoots(node *core.Node, otherwise bool) bool {
	if v := node.GetUserAgentBuildVersion().GetVersion(); v != nil && (v.MajorNumber < 1 || v.MajorNumber == 1 && v.MinorNumber < 18) {
		return true
	}
	switch v := node.GetMetadata().GetFields()["disable_spiffe_cert_validation"].GetKind().(type) {
	case *structpb.Value_BoolValue:
		return v.BoolValue
	case *structpb.Value_StringValue:
		if b, err := strconv.ParseBool(v.StringValue); err == nil {
			return b
		}
	}
	return otherwise
}

// turn sends what is new to the client.
func (c *secretCall) turn(stream grpc.ServerStream, view *registry.View) error {
	switch c.encoder.standing(view) {
	case unsynced:
		if c.sent > 0 {
			return c.server.takenBack()
		}
		return c.server.notReady(view)
	case denied:
		if (c.sent == 0 || c.lapsed) && c.failed != "" {
			return c.unknown() // which takes nothing back
		}
		if !c.denied {
			c.denied = true
			_ = c.deny(view, nil) // told in the log; the stream stays
		}
	default:
		c.denied = false
	}
	if answer := c.news(view); answer != nil {
		return c.send(stream, answer)
	}
	return nil
}

// news makes the answer with what the client was not told, or returns nil where
// there is nothing.
func (c *secretCall) news(view *registry.View) *frame {
	set := c.server.secrets.acquire(secretKey{view, c.rootsOnly})
	c.server.secrets.release(c.set)
	c.set = set
	news, gone := c.subscription.changes(set)
	if len(news)+len(gone) == 0 {
		return nil
	}
	c.version = versionOfAll(c.subscription.wanted(set))
	c.sent++
	answer := &frame{parts: c.dialect.answer(c, set, news, gone)}
	c.subscription.tell(set)
	return answer
}
