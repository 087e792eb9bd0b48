package importer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// readJSON reads a file of one value or more. A list at the top is that many
// documents.
func readJSON(in *Input) ([]node, place, string) {
	r := jsonReader{decoder: json.NewDecoder(bytes.NewReader(in.Data)), in: in, line: 1}
	r.decoder.UseNumber()
	var documents []node
	for {
		t, err := r.decoder.Token()
		if errors.Is(err, io.EOF) {
			return documents, place{}, ""
		}
		if err != nil {
			return nil, r.here(), "not valid JSON: " + clip(err.Error())
		}
		n, problem := r.value(t, 1)
		if problem != "" {
			return nil, r.here(), problem
		}
		if n.kind == list {
			documents = append(documents, n.items...)
		} else {
			documents = append(documents, n)
		}
	}
}

// jsonReader counts lines along with the decoder, whose offset only grows.
type jsonReader struct {
	decoder   *json.Decoder
	in        *Input
	offset    int
	line      int
	lineStart int
}

// here is where the last token begins or ends.
func (r *jsonReader) here() place {
	for end := min(int(r.decoder.InputOffset()), len(r.in.Data)); r.offset < end; r.offset++ {
		if r.in.Data[r.offset] == '\n' {
			r.line, r.lineStart = r.line+1, r.offset+1
		}
	}
	return place{r.in.Name, r.line, max(r.offset-r.lineStart, 1)}
}

func (r *jsonReader) value(t json.Token, depth int) (node, string) {
	if depth > maxDepth {
		return node{}, fmt.Sprintf("more than %d levels deep", maxDepth)
	}
	out := node{at: r.here()}
	switch t := t.(type) {
	case nil:
		out.kind = nothing
	case string:
		out.kind, out.text = text, t
	case json.Number:
		out.kind, out.text = number, t.String()
	case bool:
		out.kind, out.text = number, fmt.Sprint(t)
	case json.Delim:
		if t == '[' {
			out.kind = list
		} else {
			out.kind = block
		}
		return r.inside(out, depth)
	}
	return out, ""
}

// inside reads a list or block whose bracket was read.
func (r *jsonReader) inside(out node, depth int) (node, string) {
	seen := map[string]bool{}
	for {
		t, err := r.decoder.Token()
		if err != nil {
			return node{}, unread(err)
		}
		if end, ok := t.(json.Delim); ok && (end == ']' || end == '}') {
			return out, ""
		}
		if out.kind == list {
			child, problem := r.value(t, depth+1)
			if problem != "" {
				return node{}, problem
			}
			out.items = append(out.items, child)
			continue
		}
		key, at := t.(string), r.here() // the decoder takes no other key
		if seen[key] {
			return node{}, fmt.Sprintf("key %q is here twice", clip(key))
		}
		seen[key] = true
		if t, err = r.decoder.Token(); err != nil {
			return node{}, unread(err)
		}
		child, problem := r.value(t, depth+1)
		if problem != "" {
			return node{}, problem
		}
		out.pairs = append(out.pairs, pair{key, at, child})
	}
}

// unread says why a list or block cannot be read to its end.
func unread(err error) string {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return "not valid JSON: " + clip(err.Error())
}
