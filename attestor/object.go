package attestor

import (
	"context"
	"errors"
	"strings"
)

// ErrNoObject is wrapped by errors about an object that there is not, or not any
// more.
var ErrNoObject = errors.New("there is no such object")

// Object names what a control plane knows and is no process: in Kubernetes, by the
// name, the UID or both (SPIFFE Broker API §3.1.3).
type Object struct {
	Plural, Group   string // its type, such as pods and core
	Namespace, Name string // empty: only UID is known
	UID             string // empty: only the name is known
}

// String returns it as a person would, such as "pods.core shop/orders-1".
func (o Object) String() string {
	var b strings.Builder
	b.WriteString(o.Plural + "." + o.Group)
	if o.Name != "" {
		b.WriteString(" " + strings.TrimPrefix(o.Namespace+"/"+o.Name, "/"))
	}
	if o.UID != "" {
		b.WriteString(" (UID " + o.UID + ")")
	}
	return b.String()
}

// Objects is a Workload that can attest objects as well as processes.
type Objects interface {
	Workload

	// Knows tells whether it can attest objects of this type.
	Knows(plural, group string) bool

	// AttestObject returns what is known of an object, and its UID. Only what has
	// all that o says is that object. The error wraps ErrNoObject where there is
	// none; otherwise it is one of Attest.
	AttestObject(ctx context.Context, o Object) (uid string, selectors []Selector, err error)

	// FollowObject is Follower.Follow of the object with o's UID. That it is not
	// there any more is a change.
	FollowObject(o Object, found []Selector, changed func()) (stop func())
}
