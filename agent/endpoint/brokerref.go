package endpoint

import (
	"errors"
	"strconv"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/attestor"
)

// PIDReference is the type of a reference to a process by its PID: SPIFFE Broker
// API §3.1.3.
const PIDReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"

// Bounds of a reference, beside that of a message.
const (
	maxTypeURL  = 256 // bytes of what is told of it
	maxPIDBytes = 64  // of the message; one with a PID has eleven
)

// Why a broker gets nothing for a workload, as google.rpc.ErrorInfo has it: SPIFFE
// Broker API §4.8.
const (
	errorDomain = "spiffe.io"

	workloadReferenceInvalid = "WORKLOAD_REFERENCE_INVALID"
	workloadNotFound         = "WORKLOAD_NOT_FOUND"
	workloadNotEntitled      = "WORKLOAD_NOT_ENTITLED"
)

// reference is what a broker calls a workload.
type reference struct{ pid int }

// readReference reads what a broker calls a workload, and refuses what it may not
// use. The error is the status that ends the call.
func (c *brokerConn) readReference(ref *broker.WorkloadReference) (reference, error) {
	given := ref.GetReference()
	kind := given.GetTypeUrl()
	switch {
	case kind == "":
		return reference{}, invalidReference("", "the request has no workload reference: name a process, for example by %s", PIDReference)
	case kind != PIDReference:
		return reference{}, invalidReference("", "%.*q is no type of workload reference that this agent knows: it knows %s", maxTypeURL, kind, PIDReference)
	}
	_, named := c.may[kind]
	_, every := c.may[AnyReference]
	switch {
	case !named && !every:
		return reference{}, status.Errorf(codes.PermissionDenied, "broker %s may not use references of type %s: they are not among its references in agent.broker.brokers", c.id, kind)
	case !c.door.local:
		return reference{}, status.Errorf(codes.PermissionDenied, "a reference of type %s means something on its own node alone (SPIFFE Broker API §3.1.2): ask over the Unix socket of the agent that is there", kind)
	case !c.pids:
		return reference{}, status.Error(codes.PermissionDenied, "the broker is in another PID namespace than the agent, where its PIDs are those of other processes: run it in the host's (hostPID: true)")
	}
	return readPID(given.GetValue())
}

// readPID reads a WorkloadPIDReference. What it has beside the PID could mean that
// another process is meant, and is refused.
func readPID(value []byte) (reference, error) {
	var ref broker.WorkloadPIDReference
	switch {
	case len(value) > maxPIDBytes:
		return reference{}, invalidReference("", "the reference has %d bytes: one that is a PID has at most %d", len(value), maxPIDBytes)
	case proto.Unmarshal(value, &ref) != nil:
		return reference{}, invalidReference("", "the reference is not the message that its type says")
	case len(ref.ProtoReflect().GetUnknown()) > 0:
		return reference{}, invalidReference("", "the reference has more than a PID, which this agent does not know the meaning of")
	case ref.GetPid() <= 0:
		return reference{}, invalidReference(strconv.Itoa(int(ref.GetPid())), "pid is %d: want the number of a process", ref.GetPid())
	}
	return reference{pid: int(ref.GetPid())}, nil
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
	return nil, invalidReference(strconv.Itoa(r.pid), "%v", err)
}

// explain adds to the status that ends a call about a workload what it says of
// that, where it says something.
func (r reference) explain(err error) error {
	switch status.Code(err) {
	case codes.NotFound:
		return withReason(err, workloadNotFound, strconv.Itoa(r.pid))
	case codes.PermissionDenied:
		return withReason(err, workloadNotEntitled, strconv.Itoa(r.pid))
	default:
		return err
	}
}

func invalidReference(pid, format string, args ...any) error {
	return withReason(status.Errorf(codes.InvalidArgument, format, args...), workloadReferenceInvalid, pid)
}

// withReason adds an ErrorInfo. pid may be empty.
func withReason(err error, reason, pid string) error {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: errorDomain}
	if pid != "" {
		info.Metadata = map[string]string{"pid": pid}
	}
	told, detailErr := status.Convert(err).WithDetails(info)
	if detailErr != nil {
		return err // the code alone says enough
	}
	return told.Err()
}
