package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// brokered is whom a broker asks for, and where.
type brokered struct {
	at    string // target of gRPC
	agent string // the SPIFFE ID of who is to answer there
	pod   string // namespace/name
	uid   string // of the pod
	pid   int    // of a process, in place of a pod
}

// reference is what the Broker API calls the workload.
func (b brokered) reference() (*broker.WorkloadReference, error) {
	var of proto.Message
	if b.pid != 0 {
		of = &broker.WorkloadPIDReference{Pid: int32(b.pid)}
	} else {
		ref := &broker.KubernetesObjectReference{Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: b.uid}
		if namespace, name, ok := strings.Cut(b.pod, "/"); ok {
			ref.Key = &broker.KubernetesObjectKey{Namespace: namespace, Name: name}
		}
		of = ref
	}
	packed, err := anypb.New(of)
	return &broker.WorkloadReference{Reference: packed}, err
}

// subscribe says which SVIDs the workload has, until it has none any more.
func (b brokered) subscribe(ctx context.Context) error {
	agent, err := spiffeid.FromString(b.agent)
	if err != nil {
		return err
	}
	ref, err := b.reference()
	if err != nil {
		return err
	}
	ours, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer ours.Close()
	tls := tlsconfig.MTLSClientConfig(ours, ours, tlsconfig.AuthorizeID(agent))
	conn, err := grpc.NewClient(b.at, grpc.WithTransportCredentials(credentials.NewTLS(tls)))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := broker.NewAPIClient(conn).SubscribeToX509SVID(
		metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true"), &broker.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		return err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		svids, err := svidsOf(answer)
		if err != nil {
			return err
		}
		saySVIDs(svids)
	}
}

// svidsOf reads SVIDs with their keys.
func svidsOf(answer *broker.SubscribeToX509SVIDResponse) (svids []*x509svid.SVID, err error) {
	for _, s := range answer.GetSvids() {
		svid, err := x509svid.ParseRaw(s.GetX509Svid(), s.GetX509SvidKey())
		if err != nil {
			return nil, fmt.Errorf("the answer's %s: %w", s.GetSpiffeId(), err)
		}
		svids = append(svids, svid)
	}
	if len(svids) == 0 {
		return nil, errors.New("the answer has no SVID")
	}
	return svids, nil
}

// reasonOf returns why a broker gets nothing, where an error says so in the words
// of SPIFFE Broker API §4.8.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}
