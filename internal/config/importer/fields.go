package importer

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// fields are the keys of one block of the file. Whoever asks for a key has
// accounted for it; rest names those that nobody asked for. Keys are compared
// without regard to case, a value that comes twice counts the second time, and
// numbers may be in quotes: spire-agent reads its file so.
type fields struct {
	draft *draft
	path  string // of the block, like plugins.KeyManager.disk.plugin_data
	pairs []pair
	asked map[string]bool // in lower case
}

// fieldsOf are those of several values that are one block: it may be written
// in pieces. What is no block is a finding, but for JSON's null.
func (d *draft) fieldsOf(path string, pieces ...pair) *fields {
	f := &fields{draft: d, path: path, asked: map[string]bool{}}
	for _, p := range pieces {
		for _, v := range unlist(p.value) {
			switch {
			case v.kind == block:
				f.pairs = append(f.pairs, v.pairs...)
			case v.kind != text || v.text != "":
				d.lose(p.at, path, "want a block of keys")
			}
		}
	}
	return f
}

// unlist returns the values of a list, or the one that is none.
func unlist(v value) []value {
	if v.kind == list {
		return v.items
	}
	return []value{v}
}

func (f *fields) key(name string) string {
	if f.path == "" {
		return name
	}
	return f.path + "." + name
}

// all returns what stands under a key, in the order of the file.
func (f *fields) all(name string) []pair {
	f.asked[strings.ToLower(name)] = true
	var found []pair
	for _, p := range f.pairs {
		if strings.EqualFold(p.key, name) {
			found = append(found, p)
		}
	}
	return found
}

// has reports whether a key is there, without accounting for it.
func (f *fields) has(name string) bool {
	return slices.ContainsFunc(f.pairs, func(p pair) bool { return strings.EqualFold(p.key, name) })
}

// at is where a key stands; of the block where it is not there.
func (f *fields) at(name string) place {
	for _, p := range slices.Backward(f.pairs) {
		if strings.EqualFold(p.key, name) {
			return p.at
		}
	}
	if len(f.pairs) > 0 {
		return f.pairs[0].at
	}
	return place{}
}

// scalar returns the value of a key, and whether there is one.
func (f *fields) scalar(name, want string, kinds ...kind) (string, bool) {
	all := f.all(name)
	if len(all) == 0 {
		return "", false
	}
	last := all[len(all)-1]
	if !slices.Contains(kinds, last.value.kind) {
		f.draft.lose(last.at, f.key(name), "want %s", want)
		return "", false
	}
	return last.value.text, true
}

// text returns the text of a key; "" where it is not there.
func (f *fields) text(name string) string {
	s, _ := f.scalar(name, "text", text, number)
	return s
}

// flag returns whether a key is true.
func (f *fields) flag(name string) bool {
	s, _ := f.scalar(name, "true or false", flag)
	return s == "true"
}

// number returns the number of a key, and whether it is there and is one.
func (f *fields) number(name string) (int64, bool) {
	s, ok := f.scalar(name, "a whole number", number, text)
	if !ok || s == "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		f.draft.lose(f.at(name), f.key(name), "want a whole number")
		return 0, false
	}
	return n, true
}

// duration returns the duration of a key as Go writes it; "" where it is not
// there or is none.
func (f *fields) duration(name string) string {
	s := f.text(name)
	if s == "" {
		return ""
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		f.draft.lose(f.at(name), f.key(name), "%q is no duration; write for example 10m", clip(s))
		return ""
	}
	return d.String()
}

// texts returns the list of a key.
func (f *fields) texts(name string) []string {
	var out []string
	for _, p := range f.all(name) {
		out = append(out, f.draft.texts(f.key(name), p)...)
	}
	return out
}

// texts returns the list that a pair holds.
func (d *draft) texts(key string, p pair) []string {
	var out []string
	for _, v := range unlist(p.value) {
		if v.kind != text && v.kind != number {
			d.lose(p.at, key, "want a list of texts")
			return nil
		}
		out = append(out, v.text)
	}
	return out
}

// fields returns the block of a key, which is empty where it is not there.
func (f *fields) fields(name string) *fields { return f.draft.fieldsOf(f.key(name), f.all(name)...) }

// blocks returns each of the blocks of a key.
func (f *fields) blocks(name string) []*fields {
	var out []*fields
	for _, p := range f.all(name) {
		for _, v := range unlist(p.value) {
			if len(out) == maxItems {
				f.draft.lose(p.at, f.key(name), "%d of these are carried, and no more", maxItems)
				return out
			}
			path := fmt.Sprintf("%s[%d]", f.key(name), len(out))
			out = append(out, f.draft.fieldsOf(path, pair{p.key, p.at, v}))
		}
	}
	return out
}

// lose accounts for a key that is not carried, if it is there.
func (f *fields) lose(name, why string) {
	if f.has(name) {
		f.all(name)
		f.draft.lose(f.at(name), f.key(name), "%s", why)
	}
}

// loseFlag accounts for a key of which only true means something.
func (f *fields) loseFlag(name, why string) {
	if f.flag(name) {
		f.draft.lose(f.at(name), f.key(name), "%s", why)
	}
}

// ignore accounts for a key that changes nothing.
func (f *fields) ignore(names ...string) {
	for _, name := range names {
		f.all(name)
	}
}

// rest names the keys that nobody asked for, each once.
func (f *fields) rest() {
	for _, p := range f.pairs {
		if lower := strings.ToLower(p.key); !f.asked[lower] {
			f.asked[lower] = true
			f.draft.lose(p.at, f.key(clip(p.key)), "unknown key: spire-agent has none of this name here; look for a slip of the hand")
		}
	}
}
