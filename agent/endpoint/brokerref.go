package endpoint

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/attestor"
)

// Types of references: SPIFFE Broker API §3.1.3.
const (
	// PIDReference is to a process of the agent's node, by its PID.
	PIDReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
	// KubernetesReference is to an object of the agent's cluster.
	KubernetesReference = "type.googleapis.com/spiffe.broker.KubernetesObjectReference"
)

// Bounds of a reference, beside that of a message.
const (
	maxTypeURL         = 256 // bytes of what is told of it
	maxPIDBytes        = 64  // of the message; one with a PID has eleven
	maxKubernetesBytes = 2 << 10
	maxKubernetesName  = 253 // bytes of a plural, group, namespace or name (RFC 1123)
	maxKubernetesUID   = 64
)

// Why a broker gets nothing for a workload, as google.rpc.ErrorInfo has it: SPIFFE
// Broker API §4.8.
const (
	errorDomain = "spiffe.io"

	workloadReferenceInvalid = "WORKLOAD_REFERENCE_INVALID"
	workloadNotFound         = "WORKLOAD_NOT_FOUND"
	workloadNotEntitled      = "WORKLOAD_NOT_ENTITLED"
)

// reference is what a broker calls a workload: a process, or else an object.
type reference struct {
	pid    int
	object *attestor.Object
}

// readReference reads what a broker calls a workload, and refuses what it may not
// use. The error is the status that ends the call.
func (c *brokerConn) readReference(ref *broker.WorkloadReference) (reference, error) {
	given := ref.GetReference()
	kind := given.GetTypeUrl()
	switch kind {
	case PIDReference, KubernetesReference:
	case "":
		return invalidReference("the request has no workload reference: name a process, for example, by %s", PIDReference)
	default:
		return invalidReference("%.*q is no type of workload reference that this agent knows: it knows %s and %s", maxTypeURL, kind, PIDReference, KubernetesReference)
	}
	overTCP, may := c.may[kind]
	if !may {
		overTCP, may = c.may[AnyReference]
	}
	switch {
	case !may:
		return reference{}, status.Errorf(codes.PermissionDenied, "broker %s may not use references of type %s: they are not among its references in agent.broker.brokers", c.id, kind)
	case kind == PIDReference && !c.door.local:
		return reference{}, status.Errorf(codes.PermissionDenied, "a reference of type %s means something on its own node alone (SPIFFE Broker API §3.1.2): ask over the Unix socket of the agent that is there", kind)
	case kind == PIDReference && !c.pids:
		return reference{}, status.Error(codes.PermissionDenied, "the broker is in another PID namespace than the agent, where its PIDs are those of other processes: run it in the host's (hostPID: true)")
	case !c.door.local && !overTCP:
		return reference{}, status.Errorf(codes.PermissionDenied, "broker %s may not use references of type %s over TCP: set allow_over_tcp in agent.broker.brokers, or ask over the Unix socket", c.id, kind)
	case kind == PIDReference:
		return readPID(given.GetValue())
	}
	return c.door.readObject(given.GetValue())
}

// readPID reads a WorkloadPIDReference. What it has beside the PID could mean that
// another process is meant, and is refused.
func readPID(value []byte) (reference, error) {
	var ref broker.WorkloadPIDReference
	r := reference{}
	switch {
	case len(value) > maxPIDBytes:
		return invalidReference("the reference has %d bytes: one that is a PID has at most %d", len(value), maxPIDBytes)
	case proto.Unmarshal(value, &ref) != nil:
		return invalidReference("the reference is not the message that its type says")
	case len(ref.ProtoReflect().GetUnknown()) > 0:
		return invalidReference("the reference has more than a PID, which this agent does not know the meaning of")
	}
	if r.pid = int(ref.GetPid()); r.pid <= 0 {
		return reference{}, r.invalid("pid is %d: want the number of a process", r.pid)
	}
	return r, nil
}

// readObject reads a KubernetesObjectReference to an object of a type that an
// attestor of this agent knows.
func (d *door) readObject(value []byte) (reference, error) {
	var ref broker.KubernetesObjectReference
	switch {
	case len(value) > maxKubernetesBytes:
		return invalidReference("the reference has %d bytes: one to an object of Kubernetes has at most %d", len(value), maxKubernetesBytes)
	case proto.Unmarshal(value, &ref) != nil:
		return invalidReference("the reference is not the message that its type says")
	case len(ref.ProtoReflect().GetUnknown())+len(ref.GetType().ProtoReflect().GetUnknown())+len(ref.GetKey().ProtoReflect().GetUnknown()) > 0:
		return invalidReference("the reference has more than type, key and uid, which this agent does not know the meaning of")
	}
	o := &attestor.Object{
		Plural: ref.GetType().GetPlural(), Group: ref.GetType().GetGroup(),
		Namespace: ref.GetKey().GetNamespace(), Name: ref.GetKey().GetName(), UID: ref.GetUid(),
	}
	for _, name := range []string{o.Plural, o.Group, o.Namespace, o.Name} {
		if len(name) > maxKubernetesName || strings.ContainsFunc(name, notInName) {
			return invalidReference("%.*q is no name in Kubernetes (RFC 1123)", maxKubernetesName, name)
		}
	}
	switch {
	case o.Plural == "" || o.Group == "":
		return invalidReference("the reference has no type: want for example plural \"pods\" and group \"core\"")
	case ref.GetKey() == nil && o.UID == "":
		return invalidReference("the reference has neither key nor uid")
	case ref.GetKey() != nil && (o.Name == "" || o.Namespace == ""):
		return invalidReference("the reference has a key without namespace or name")
	case len(o.UID) > maxKubernetesUID || strings.ContainsFunc(o.UID, notInUID):
		return invalidReference("%.*q is no UID of Kubernetes", maxKubernetesUID, o.UID)
	case !slices.ContainsFunc(d.server.objects, func(by attestor.Objects) bool { return knows(by, o) }):
		return invalidReference("no attestor of this agent knows objects of type %s.%s: for pods, it takes workload_attestors.k8s without sigstore", o.Plural, o.Group)
	}
	return reference{object: o}, nil
}

func notInName(c rune) bool {
	return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.'
}

// notInUID tells what is in no UUID, nor in the UID that a kubelet gives to a static
// pod.
func notInUID(c rune) bool {
	return (c < 'a' || c > 'f') && (c < 'A' || c > 'F') && (c < '0' || c > '9') && c != '-'
}

// pin pins the process.
func (r reference) pin() (*attestor.Process, error) {
	process, err := attestor.Pin(r.pid)
	var system syscall.Errno
	switch {
	case err == nil:
		return process, nil
	case errors.Is(err, attestor.ErrProcessGone), errors.Is(err, attestor.ErrPIDNamespace):
		return nil, r.explain(status.Error(codes.NotFound, err.Error()))
	case errors.As(err, &system): // as without a file descriptor left
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return nil, r.invalid("%v", err)
}

// explain adds to the status that ends a call about a workload what it says of
// that, where it says something.
func (r reference) explain(err error) error {
	switch status.Code(err) {
	case codes.NotFound:
		return r.withReason(err, workloadNotFound)
	case codes.PermissionDenied:
		return r.withReason(err, workloadNotEntitled)
	default:
		return err
	}
}

func invalidReference(format string, args ...any) (reference, error) {
	return reference{}, reference{}.invalid(format, args...)
}

func (r reference) invalid(format string, args ...any) error {
	return r.withReason(status.Errorf(codes.InvalidArgument, format, args...), workloadReferenceInvalid)
}

// withReason adds an ErrorInfo.
func (r reference) withReason(err error, reason string) error {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: errorDomain}
	switch {
	case r.object != nil:
		info.Metadata = map[string]string{"object": r.object.String()}
	case r.pid != 0:
		info.Metadata = map[string]string{"pid": strconv.Itoa(r.pid)}
	}
	told, detailErr := status.Convert(err).WithDetails(info)
	if detailErr != nil {
		return err // the code alone says enough
	}
	return told.Err()
}
