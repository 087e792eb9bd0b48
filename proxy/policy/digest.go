package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"math"
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
	buf    []byte   // written, and not hashed yet
	words  []string // room for a set
}

func (d *digester) text(s string) {
	d.buf = append(binary.BigEndian.AppendUint64(d.buf, uint64(len(s))), s...)
	d.flush(4096)
}

func (d *digester) bytes(b ...byte) { d.buf = append(d.buf, b...) }

// flush hashes what was written, if it is that much.
func (d *digester) flush(least int) {
	if len(d.buf) >= least {
		d.h.Write(d.buf)
		d.buf = d.buf[:0]
	}
}

// sum ends the digest and begins the next one.
func (d *digester) sum() [sha256.Size]byte {
	d.flush(0)
	sum := [sha256.Size]byte(d.h.Sum(nil))
	d.h.Reset()
	return sum
}

// set writes texts regardless of order and repetition. It sorts in place.
func (d *digester) set(texts []string) {
	slices.Sort(texts)
	texts = slices.Compact(texts)
	d.buf = binary.BigEndian.AppendUint64(d.buf, uint64(len(texts)))
	for _, s := range texts {
		d.text(s)
	}
}

func patternTexts(patterns []*member) []string {
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
		inner := newDigester()
		inner.set(patternTexts(g.patterns))
		hash := inner.sum()
		sum = string(hash[:])
		d.groups[g] = sum
	}
	return sum
}

func (d *digester) subjects(s *subjects) {
	words := d.words[:0]
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
	d.words = words[:0]
}

func boolByte(set bool) byte {
	if set {
		return 1
	}
	return 0
}

func newDigester() *digester { return &digester{h: sha256.New(), groups: map[*group]string{}} }

func (d *digester) rule(r *rule) {
	d.text("rule")
	d.text(r.id)
	d.bytes(byte(r.at), boolByte(r.allow), boolByte(r.shadow), boolByte(r.more != nil))
	d.set(slices.Clone(r.on))
	d.subjects(&r.from)
	d.subjects(&r.to)
	if r.more != nil {
		d.conditions(r.more)
	}
}

func (d *digester) conditions(c *conditions) {
	d.set(words(c.networks))
	d.set(words(c.notNetworks))
	d.set(words(c.ports))
	d.set(words(c.sni))
	if c.when != nil {
		d.text("when")
		d.text(c.when.text)
	}
	if c.http == nil {
		return
	}
	d.text("http")
	d.bytes(boolByte(c.http.grpc))
	d.set(slices.Clone(c.http.methods))
	d.set(words(c.http.hosts))
	paths := make([]string, len(c.http.paths))
	for i := range paths {
		paths[i] = c.http.paths[i].text
	}
	d.set(paths)
	headers := make([]string, len(c.http.headers))
	for i := range c.http.headers {
		h := &c.http.headers[i]
		inner := newDigester()
		inner.text(h.name)
		inner.bytes(byte(h.want))
		inner.set(slices.Clone(h.values))
		sum := inner.sum()
		headers[i] = string(sum[:])
	}
	d.set(headers)
	if c.http.subjects != nil {
		d.text("subjects")
		d.subjects(&c.http.subjects.subjects)
	}
}

func (d *digester) limit(l *limit) {
	d.text("limit")
	d.text(l.ID)
	d.text(fmt.Sprintf("%d %x %d %d", l.Per, math.Float64bits(l.RPS), l.Burst, l.Connections))
	d.set(slices.Clone(l.on))
	d.subjects(&l.from)
	d.subjects(&l.to)
}

func (p *Policy) digest() [32]byte {
	d := newDigester()
	for i := range p.rules {
		d.rule(&p.rules[i])
	}
	for i := range p.limits {
		d.limit(&p.limits[i])
	}
	var revoked []string
	for i := range p.revoked {
		r := &p.revoked[i]
		name := r.issuer + " " + r.serial
		if r.pattern != nil {
			name = r.pattern.text
		}
		revoked = append(revoked, name)
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
	return d.sum()
}
