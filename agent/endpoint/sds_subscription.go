package endpoint

import (
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds of what one SDS stream may ask for. What is asked for and not there is
// kept for as long as the stream is open.
const (
	maxSecretNames      = 256
	maxSecretName       = 2 << 10  // the longest SPIFFE ID
	maxSecretNamesBytes = 16 << 10 // of all names together
)

// allSecrets is the name by which xDS asks for everything.
const allSecrets = "*"

// subscription is what one SDS stream asked for and what it was told.
type subscription struct {
	wildcard bool
	unnamed  bool          // a wildcard because the client never named anything
	known    []knownSecret // sorted by name
}

// knownSecret is one that the client asked for by name, or was told of, or both.
type knownSecret struct {
	name    string
	named   bool
	told    bool
	version version // that it was told; the zero version is none
}

func (s *subscription) find(name string) (at int, found bool) {
	return slices.BinarySearchFunc(s.known, name, func(k knownSecret, name string) int {
		return strings.Compare(k.name, name)
	})
}

// entry returns that of a name, new where there is none. It is good until the
// next one is made.
func (s *subscription) entry(name string) *knownSecret {
	at, found := s.find(name)
	if !found {
		s.known = slices.Insert(s.known, at, knownSecret{name: name})
	}
	return &s.known[at]
}

// wants tells whether the client asked for the secret.
func (s *subscription) wants(x *secret) bool {
	if s.wildcard && x.wild {
		return true
	}
	at, found := s.find(x.name)
	return found && s.known[at].named
}

// wanted returns those of the set that the client asked for.
func (s *subscription) wanted(set *secretSet) []*secret {
	var all []*secret
	for _, x := range set.secrets {
		if s.wants(x) {
			all = append(all, x)
		}
	}
	return all
}

// changes returns what the client asked for and was not told of, and the names
// of what it was told of that it does not have any more. While an SVID is being
// replaced nothing is taken from the client, which keeps what it has.
func (s *subscription) changes(set *secretSet) (news []*secret, gone []string) {
	for _, x := range s.wanted(set) {
		if at, found := s.find(x.name); !found || !s.known[at].told || s.known[at].version != x.version {
			news = append(news, x)
		}
	}
	for _, k := range s.known {
		if x := set.find(k.name); k.told && !set.partial && (x == nil || !s.wants(x)) {
			gone = append(gone, k.name)
		}
	}
	return news, gone
}

// tell notes that the client has been told of what it wants of the set.
func (s *subscription) tell(set *secretSet) {
	wanted := s.wanted(set)
	if !set.partial {
		s.known = slices.DeleteFunc(s.known, func(k knownSecret) bool { return !k.named })
		for i := range s.known {
			s.known[i].told = false
		}
	}
	for _, x := range wanted {
		k := s.entry(x.name)
		k.name = x.name // in memory once
		k.told, k.version = true, x.version
	}
}

// add subscribes to names. A client that names what it has wants it again: it
// may have thrown it away.
func (s *subscription) add(names []string) error {
	if len(names) > maxSecretNames {
		return errTooManyNames
	}
	for _, name := range names {
		switch {
		case len(name) > maxSecretName:
			return status.Errorf(codes.InvalidArgument, "a resource name has %d bytes, more than the %d of a SPIFFE ID: %.40q", len(name), maxSecretName, name)
		case name == allSecrets:
			s.wildcard = true
		case name != "":
			k := s.entry(name)
			k.named, k.version = true, version{}
		}
	}
	named, size := 0, 0
	for _, k := range s.known {
		if k.named {
			named, size = named+1, size+len(k.name)
		}
	}
	if named > maxSecretNames || size > maxSecretNamesBytes {
		return errTooManyNames
	}
	return nil
}

var errTooManyNames = status.Errorf(codes.InvalidArgument, "the stream names more resources than the %d, of %d bytes together, that it may: open another one", maxSecretNames, maxSecretNamesBytes)

var errLocators = status.Error(codes.InvalidArgument, "resource locators (xdstp) are not served: name the resources")

// hasNames tells whether there is a name that is not empty.
func hasNames(names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return name != "" })
}

// remove unsubscribes from names. What a wildcard still covers is told again,
// and what it does not is told to be gone: else a client that has both could not
// know which of them it is.
func (s *subscription) remove(names []string) {
	for _, name := range names {
		at, found := s.find(name)
		switch {
		case name == allSecrets:
			s.wildcard = false
			s.known = slices.DeleteFunc(s.known, func(k knownSecret) bool { return !k.named })
		case found && s.wildcard && s.known[at].told:
			s.known[at].named, s.known[at].version = false, version{}
		case found:
			s.known = slices.Delete(s.known, at, at+1)
		}
	}
}

// replace subscribes to these names and no others. What the client was told
// of those stays so.
func (s *subscription) replace(names []string) error {
	before := subscription{known: s.known}
	*s = subscription{}
	if err := s.add(names); err != nil {
		return err
	}
	for _, k := range before.known {
		if at, found := s.find(k.name); found {
			s.known[at].told, s.known[at].version = k.told, k.version
		} else if s.wildcard && k.told {
			k.named = false
			s.known = slices.Insert(s.known, at, k)
		}
	}
	return nil
}

// resume notes what the client says it was told on an earlier stream, as far as
// there is room. It is sent what is left out.
func (s *subscription) resume(versions map[string]string) {
	names := make([]string, 0, len(versions))
	for name := range versions {
		if at, found := s.find(name); s.wildcard || found && s.known[at].named {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if _, found := s.find(name); !found && (len(s.known) >= maxSecretNames || s.nameBytes()+len(name) > maxSecretNamesBytes) {
			continue
		}
		k := s.entry(name)
		k.told, k.version = true, parseVersion(versions[name])
	}
}

func (s *subscription) nameBytes() (n int) {
	for _, k := range s.known {
		n += len(k.name)
	}
	return n
}
