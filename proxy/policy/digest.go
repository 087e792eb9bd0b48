package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"slices"
)

// Hash returns a digest of what the policy means: it stays the same when
// rules, keys and files are put in another order, or comments and quotes
// change. A policy that says the same in other words (a group written out)
// may have another. A nil Policy has the zero Hash.
func (p *Policy) Hash() [32]byte {
	if p == nil {
		return [32]byte{}
	}
	return p.hash
}

// Equal reports whether two policies have the same Hash: putting one in the
// other's place changes no decision.
func (p *Policy) Equal(o *Policy) bool { return p.Hash() == o.Hash() }

// digester writes values so that no two sequences of values look alike.
type digester struct {
	h      hash.Hash
	groups map[*group]string
}

func (d *digester) text(s string) {
	var size [8]byte
	binary.BigEndian.PutUint64(size[:], uint64(len(s)))
	d.h.Write(size[:])
	d.h.Write([]byte(s))
}

// set writes texts regardless of order and repetition. It sorts in place.
func (d *digester) set(texts []string) {
	slices.Sort(texts)
	texts = slices.Compact(texts)
	d.text(string(binary.BigEndian.AppendUint64(nil, uint64(len(texts)))))
	for _, s := range texts {
		d.text(s)
	}
}

func patternTexts(patterns []Pattern) []string {
	texts := make([]string, len(patterns))
	for i := range patterns {
		texts[i] = patterns[i].text
	}
	return texts
}

// group returns the digest of what a group holds; its name means nothing.
func (d *digester) group(g *group) string {
	sum, ok := d.groups[g]
	if !ok {
		inner := digester{h: sha256.New()}
		inner.set(patternTexts(g.patterns))
		sum = string(inner.h.Sum(nil))
		d.groups[g] = sum
	}
	return sum
}

func (d *digester) subjects(s *subjects) {
	words := make([]string, 0, len(s.patterns)+len(s.groups)+1)
	if !s.given {
		words = append(words, "anyone")
	}
	if s.unauthenticated {
		words = append(words, Unauthenticated)
	}
	for i := range s.patterns {
		words = append(words, s.patterns[i].text)
	}
	for _, g := range s.groups {
		words = append(words, groupPrefix+d.group(g))
	}
	d.set(words)
}

func effectByte(allow bool) byte {
	if allow {
		return 1
	}
	return 0
}

func (p *Policy) digest() [32]byte {
	d := digester{h: sha256.New(), groups: map[*group]string{}}
	for i := range p.rules {
		r := &p.rules[i]
		d.text("rule")
		d.text(r.id)
		d.h.Write([]byte{byte(r.at), effectByte(r.allow)})
		d.set(slices.Clone(r.on))
		d.subjects(&r.from)
		d.subjects(&r.to)
	}
	var revoked []string
	for i := range p.revoked {
		r := &p.revoked[i]
		revoked = append(revoked, r.pattern.text+" "+r.issuer+" "+r.serial)
	}
	d.text("revoked")
	d.set(revoked)
	var domains []string
	for name := range p.ceilings {
		domains = append(domains, name)
	}
	slices.Sort(domains)
	for _, name := range domains {
		d.text("ceiling")
		d.text(name)
		d.set(patternTexts(p.ceilings[name].patterns))
	}
	return [32]byte(d.h.Sum(nil))
}
