package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// unknown says that a key does not belong where it stands, and which one may
// be meant: a key of that block with nearly the same letters, else the same
// key in another block. The first result is the key meant, if it is of this
// block.
func unknown(key string, known []string) (meant, problem string) {
	if meant = nearest(key, known); meant != "" {
		return meant, fmt.Sprintf("unknown key; did you mean %q?", meant)
	}
	if places := placesOf(key); len(places) > 0 {
		return "", fmt.Sprintf("unknown key here; did you mean %s?", strings.Join(places, " or "))
	}
	if len(known) == 0 {
		return "", "unknown key; this block has none"
	}
	return "", "unknown key; known here: " + strings.Join(known, ", ")
}

// nearest returns the word that needs the fewest edits to become s, if they
// are few enough to be a slip of the hand.
func nearest(s string, words []string) string {
	if len(s) > 64 { // no slip, and not worth the square of its length
		return ""
	}
	plain := strings.NewReplacer("-", "", "_", "", " ", "")
	best, bestEdits := "", 1+max(len(s)/3, 1)
	for _, w := range words {
		if strings.EqualFold(plain.Replace(s), plain.Replace(w)) {
			return w
		}
		if short := min(len(s), len(w)); short > 2 && strings.EqualFold(s[:short], w[:short]) {
			return w
		}
		if n := edits(strings.ToLower(s), w); n < bestEdits {
			best, bestEdits = w, n
		}
	}
	return best
}

// edits is the optimal string alignment distance: insertions, deletions,
// substitutions and swaps of two neighbours.
func edits(a, b string) int {
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}

// placesOf returns the paths at which the key is known, at most three.
func placesOf(key string) []string {
	var found []string
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
			if t.Kind() == reflect.Slice {
				path += "[]"
			}
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return
		}
		for name, f := range keysOf(t) {
			at := join(path, name)
			if name == key {
				found = append(found, at)
			}
			walk(f.Type, at)
		}
	}
	walk(reflect.TypeFor[Config](), "")
	slices.Sort(found)
	return found[:min(len(found), 3)]
}

// meant looks up a word of another tongue: "grpc=http|h2=http" says that who
// writes grpc here will want http. It returns "" for what is not in the list.
func meant(list, s string) string {
	for pair := range strings.SplitSeq(list, "|") {
		if from, to, _ := strings.Cut(pair, "="); strings.EqualFold(from, s) {
			return to
		}
	}
	return ""
}
