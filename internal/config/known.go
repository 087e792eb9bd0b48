package config

import (
	"reflect"
	"strings"
)

// Knows reports whether this version has the key, which is written as in
// findings with the indices left out: agent.server.address,
// proxy.listeners[].bind. Who writes a narthex.yaml asks it before the reader
// would refuse.
func Knows(key string) bool {
	t := reflect.TypeFor[Config]()
	for name := range strings.SplitSeq(key, ".") {
		name, isList := strings.CutSuffix(name, "[]")
		t = typeOfKey(t, name)
		if t == nil || isList && t.Kind() != reflect.Slice {
			return false
		}
		if isList {
			t = t.Elem()
		}
	}
	return true
}

// typeOfKey is what a block holds under a key; nil where it has no such key.
func typeOfKey(block reflect.Type, key string) reflect.Type {
	if block.Kind() != reflect.Struct {
		return nil
	}
	for name, f := range keysOf(block) {
		if name != key {
			continue
		}
		if f.Type.Kind() == reflect.Pointer {
			return f.Type.Elem()
		}
		return f.Type
	}
	return nil
}
