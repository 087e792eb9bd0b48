package endpoint

import (
	"bytes"
	"slices"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
)

// frame is an answer in protobuf's wire format, made once and sent to every
// caller that is entitled to the same. It is immutable. Its parts are for the
// most part the registry's own bytes, not copies: a bundle is in memory once,
// however many different answers contain it.
type frame struct {
	parts mem.BufferSlice
	key   frameKey
}

type frameKey struct {
	encoder *encoder
	view    *registry.View
}

// same tells whether f and o say the same, byte for byte.
func (f *frame) same(o *frame) bool {
	if f == o || o == nil {
		return f == o
	}
	return slices.EqualFunc(f.parts, o.parts, func(a, b mem.Buffer) bool {
		return bytes.Equal(a.ReadOnlyData(), b.ReadOnlyData())
	})
}

// frames holds each frame for as long as a stream's newest answer is that
// frame.
type frames struct{ shared[frameKey, *frame] }

func newFrames() frames { return frames{newShared[frameKey, *frame]()} }

// acquire returns what e makes of view. It is followed by one release.
func (s *frames) acquire(e *encoder, view *registry.View) *frame {
	key := frameKey{e, view}
	return s.shared.acquire(key, func() *frame { return &frame{parts: e.encode(view), key: key} })
}

// release gives a frame back; nil is none, and one that was not acquired is
// nobody else's.
func (s *frames) release(f *frame) {
	if f != nil && f.key.encoder != nil {
		s.shared.release(f.key)
	}
}

// wire builds a frame's parts. Fields of proto3 that are empty are left out,
// as its encoders do.
type wire struct {
	parts mem.BufferSlice
	glue  []byte // tags, lengths and small fields since the last part
}

// text appends a small field by copying it.
func (w *wire) text(field protowire.Number, s string) {
	if s != "" {
		w.glue = protowire.AppendTag(w.glue, field, protowire.BytesType)
		w.glue = protowire.AppendString(w.glue, s)
	}
}

// number appends a small field.
func (w *wire) number(field protowire.Number, n uint64) {
	if n != 0 {
		w.glue = protowire.AppendTag(w.glue, field, protowire.VarintType)
		w.glue = protowire.AppendVarint(w.glue, n)
	}
}

// message appends a field that is a message, also where that is empty.
func (w *wire) message(field protowire.Number, inner *wire) {
	parts := inner.done()
	w.open(field, parts.Len())
	w.flush()
	w.parts = append(w.parts, parts...)
}

// shared appends a field whose bytes are referred to and never change.
func (w *wire) shared(field protowire.Number, b []byte) {
	if len(b) > 0 {
		w.open(field, len(b))
		w.flush()
		w.parts = append(w.parts, mem.SliceBuffer(b))
	}
}

// open begins a field of so many bytes, which the caller appends.
func (w *wire) open(field protowire.Number, size int) {
	w.glue = protowire.AppendTag(w.glue, field, protowire.BytesType)
	w.glue = protowire.AppendVarint(w.glue, uint64(size))
}

func (w *wire) flush() {
	if len(w.glue) > 0 {
		w.parts = append(w.parts, mem.SliceBuffer(slices.Clip(w.glue)))
		w.glue = w.glue[len(w.glue):]
	}
}

func (w *wire) done() mem.BufferSlice {
	w.flush()
	return slices.Clip(w.parts)
}

// fieldSize is the size of a field of n bytes, 0 where it is left out.
func fieldSize(field protowire.Number, n int) int {
	if n == 0 {
		return 0
	}
	return protowire.SizeTag(field) + protowire.SizeBytes(n)
}

// codec sends frames as they are and leaves other messages to gRPC's own.
// Unlike grpc.PreparedMsg, a frame is the same whether or not the client
// asked for compression.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal implements encoding.CodecV2. The parts of a frame are counted by
// nobody: freeing them does nothing.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case *frame:
		return v.parts, nil
	case *answer:
		return v.parts, nil
	}
	return c.CodecV2.Marshal(v)
}
