package spire

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
)

// Fields of SyncAuthorizedEntriesResponse and of EntryRevision.
const (
	fieldEntryRevisions = 1
	fieldEntries        = 2
	fieldMore           = 3

	fieldID             = 1
	fieldRevisionNumber = 2
	fieldCreatedAt      = 3
)

// rawCodec is gRPC's for protobuf, but for messages that are read in the bytes
// they came in: most of a list of revisions is known, and decoding it would
// take several times as long as telling that.
type rawCodec struct{ encoding.CodecV2 }

// rawMessage is to be freed.
type rawMessage struct{ mem.Buffer }

func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	raw, ok := v.(*rawMessage)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	raw.Buffer = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}

var inRaw = rawCodec{encoding.GetCodecV2(protocodec.Name)}

// outline is what a page says beside its revisions.
type outline struct {
	revisions, entries int // how many
	more               bool
}

// readPage reads a SyncAuthorizedEntriesResponse and calls revision with each
// EntryRevision in it, encoded as it is.
func readPage(b []byte, revision func([]byte) error) (outline, error) {
	var o outline
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return o, badAnswer("a page of entries: %w", protowire.ParseError(n))
		}
		b = b[n:]
		value := b
		if n = protowire.ConsumeFieldValue(field, kind, b); n < 0 {
			return o, badAnswer("field %d of a page of entries: %w", field, protowire.ParseError(n))
		}
		b = b[n:]
		switch {
		case field == fieldEntryRevisions && kind == protowire.BytesType:
			o.revisions++
			record, _ := protowire.ConsumeBytes(value)
			if err := revision(record); err != nil {
				return o, err
			}
		case field == fieldEntries && kind == protowire.BytesType:
			o.entries++
		case field == fieldMore && kind == protowire.VarintType:
			v, _ := protowire.ConsumeVarint(value)
			o.more = protowire.DecodeBool(v)
		}
	}
	return o, nil
}

// list reads one page, of the revisions of entries or of entries. The latter
// are returned, and nil if it is the former.
func (s *syncing) list(stream entryStream) (o outline, entries *entryv1.SyncAuthorizedEntriesResponse, err error) {
	var raw rawMessage
	switch err := stream.RecvMsg(&raw); {
	case errors.Is(err, io.EOF):
		return o, nil, errEarlyEnd
	case err != nil:
		return o, nil, err
	}
	defer raw.Free()
	if o, err = readPage(raw.ReadOnlyData(), s.listRevision); err != nil {
		return o, nil, err
	}
	switch {
	case o.revisions > 0 && o.entries > 0:
		return o, nil, badAnswer("entries among the revisions")
	case o.revisions > 0:
		return o, nil, nil
	}
	entries = &entryv1.SyncAuthorizedEntriesResponse{}
	if err := proto.Unmarshal(raw.ReadOnlyData(), entries); err != nil {
		return o, nil, badAnswer("a page of entries: %w", err)
	}
	return o, entries, checkPage(entries)
}

// revision tells versions of an entry apart.
type revision struct{ number, createdAt int64 }

// listRevision takes over what is known, and gathers the rest.
func (s *syncing) listRevision(record []byte) error {
	slot, again := s.known.find(record, s.seen)
	if slot >= 0 && !again {
		s.seen[slot] = true
		s.still++
	} else {
		r := &s.record
		if err := proto.Unmarshal(record, r); err != nil {
			return badAnswer("a page of entries: %w", err)
		}
		_, listed := s.changed[r.GetId()]
		switch {
		case r.GetId() == "" || r.GetRevisionNumber() < 0:
			s.leaveOut(fmt.Errorf("entry %q: revision %d", r.GetId(), r.GetRevisionNumber()))
		case listed || again:
			s.leaveOut(errTwice(r.GetId()))
		default:
			s.changed[r.GetId()] = revision{r.GetRevisionNumber(), r.GetCreatedAt()}
		}
	}
	if s.still+len(s.changed) > maxEntries {
		return tooMany()
	}
	return nil
}

// wanted ends the list of revisions: it notes which entries are as they were,
// and returns the sorted ids of those that are to be asked for.
func (s *syncing) wanted() []string {
	if s.still == len(s.known.list) && len(s.changed) == 0 {
		return nil
	}
	s.kept = make([]bool, len(s.known.list))
	var record []byte
	for i := range s.known.list {
		e := &s.known.list[i]
		record = appendRevision(record[:0], e)
		_, kept := s.known.find(record, s.seen)
		r, listed := s.changed[e.ID]
		switch {
		case kept && listed: // in two versions: what it says is asked for
			s.leaveOut(errTwice(e.ID))
			s.still--
			kept = false
		case listed && !stale(e, r):
			delete(s.changed, e.ID)
			s.still++
			kept = true
		}
		s.kept[i] = kept
	}
	ids := slices.Sorted(maps.Keys(s.changed)) // which spares the server work
	s.changed = nil
	return ids
}

// stale tells whether the server has another version of e. An entry that was
// deleted and made again under its id begins with the revisions of the old
// one, hence the time; older servers leave that out of the list.
func stale(e *registry.Entry, r revision) bool {
	return e.Revision != r.number || r.createdAt != 0 && r.createdAt != toUnix(e.CreatedAt)
}

func errTwice(id string) error { return fmt.Errorf("entry %q: listed twice", id) }
