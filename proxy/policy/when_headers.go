package policy

import (
	"errors"
	"reflect"

	"cel.dev/cel-go/common/types"
	celref "cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// headerMap is the header lines of a request as a map of lists by name. A name
// that was sent several times is one key with several values, in their order.
type headerMap struct {
	opaque
	lines []Header
}

var _ traits.Mapper = (*headerMap)(nil)

// Type returns the type of maps.
func (h *headerMap) Type() celref.Type { return types.MapType }

// Find returns the values of a name, and whether it was sent at all.
func (h *headerMap) Find(key celref.Val) (celref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(key), false
	}
	first, n := 0, 0
	for i := range h.lines {
		if h.lines[i].Name == string(name) {
			if n == 0 {
				first = i
			}
			n++
		}
	}
	if n == 0 {
		return nil, false
	}
	return &headerValues{lines: h.lines[first:], name: string(name), n: n}, true
}

// Get returns the values of a name, or an error if it was not sent.
func (h *headerMap) Get(key celref.Val) celref.Val {
	found, ok := h.Find(key)
	if !ok && found == nil {
		return types.NewErr("no such key: %v", key)
	}
	return found
}

// Contains returns whether a name was sent.
func (h *headerMap) Contains(key celref.Val) celref.Val {
	found, ok := h.Find(key)
	if !ok && found != nil {
		return found // the error
	}
	return types.Bool(ok)
}

// Size returns the number of names.
func (h *headerMap) Size() celref.Val {
	n := 0
	for i := range h.lines {
		if h.firstOfName(i) {
			n++
		}
	}
	return types.Int(n)
}

// Iterator goes over the names, each once, in the order they were sent.
func (h *headerMap) Iterator() traits.Iterator { return &namesIterator{headers: h} }

// firstOfName reports whether no line before has the name of this one. There
// are few enough lines that no set is needed.
func (h *headerMap) firstOfName(i int) bool {
	for j := range i {
		if h.lines[j].Name == h.lines[i].Name {
			return false
		}
	}
	return true
}

type namesIterator struct {
	opaque
	headers *headerMap
	next    int
}

// Type returns the type of iterators.
func (it *namesIterator) Type() celref.Type { return types.IteratorType }

// HasNext returns whether a name is left.
func (it *namesIterator) HasNext() celref.Val {
	for it.next < len(it.headers.lines) && !it.headers.firstOfName(it.next) {
		it.next++
	}
	return types.Bool(it.next < len(it.headers.lines))
}

// Next returns the next name; nil if HasNext is false.
func (it *namesIterator) Next() celref.Val {
	if it.HasNext() != types.True {
		return nil
	}
	it.next++
	return types.String(it.headers.lines[it.next-1].Name)
}

// headerValues are the values of one name.
type headerValues struct {
	opaque
	lines []Header // from the first that has the name
	name  string
	n     int // lines that have it; at least 1
}

var _ traits.Lister = (*headerValues)(nil)

// Type returns the type of lists.
func (v *headerValues) Type() celref.Type { return types.ListType }

// Get returns one value, counted from 0.
func (v *headerValues) Get(index celref.Val) celref.Val {
	i, err := types.IndexOrError(index)
	if err != nil {
		return types.WrapErr(err)
	}
	if i >= 0 && i < v.n {
		for j := range v.lines {
			if v.lines[j].Name != v.name {
				continue
			}
			if i == 0 {
				return types.String(v.lines[j].Value)
			}
			i--
		}
	}
	return types.NewErr("index out of bounds: %d", i)
}

// Contains returns whether one of the values is that text.
func (v *headerValues) Contains(value celref.Val) celref.Val {
	text, ok := value.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(value)
	}
	for i := range v.lines {
		if v.lines[i].Name == v.name && v.lines[i].Value == string(text) {
			return types.True
		}
	}
	return types.False
}

// Equal returns whether the other list holds the same texts in the same order.
func (v *headerValues) Equal(other celref.Val) celref.Val {
	list, ok := other.(traits.Lister)
	if !ok || list.Size() != v.Size() {
		return types.False
	}
	mine, others := v.Iterator(), list.Iterator()
	for mine.HasNext() == types.True && others.HasNext() == types.True {
		if mine.Next().Equal(others.Next()) != types.True {
			return types.False
		}
	}
	return types.True
}

// Add returns an error: lists are not joined in conditions.
func (v *headerValues) Add(other celref.Val) celref.Val { return types.MaybeNoSuchOverloadErr(other) }

// Size returns the number of values.
func (v *headerValues) Size() celref.Val { return types.Int(v.n) }

// Iterator goes over the values.
func (v *headerValues) Iterator() traits.Iterator { return &valuesIterator{values: v} }

type valuesIterator struct {
	opaque
	values *headerValues
	next   int
}

// Type returns the type of iterators.
func (it *valuesIterator) Type() celref.Type { return types.IteratorType }

// HasNext returns whether a value is left.
func (it *valuesIterator) HasNext() celref.Val {
	lines := it.values.lines
	for it.next < len(lines) && lines[it.next].Name != it.values.name {
		it.next++
	}
	return types.Bool(it.next < len(lines))
}

// Next returns the next value; nil if HasNext is false.
func (it *valuesIterator) Next() celref.Val {
	if it.HasNext() != types.True {
		return nil
	}
	it.next++
	return types.String(it.values.lines[it.next-1].Value)
}

// opaque is what the library wants of every value and no condition can reach.
type opaque struct{}

var errOpaque = errors.New("the value has no other form")

// ConvertToNative returns an error.
func (opaque) ConvertToNative(reflect.Type) (any, error) { return nil, errOpaque }

// ConvertToType returns an error.
func (opaque) ConvertToType(celref.Type) celref.Val { return types.WrapErr(errOpaque) }

// Equal returns an error.
func (opaque) Equal(celref.Val) celref.Val { return types.WrapErr(errOpaque) }

// Value returns nil.
func (opaque) Value() any { return nil }
