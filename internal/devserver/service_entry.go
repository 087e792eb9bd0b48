package devserver

import (
	"context"
	"errors"
	"io"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// entryPage is how many entries go out whole, and how many make a page. It is
// the real server's.
const entryPage = 500

// entryService is spire.api.server.entry.v1.Entry.
type entryService struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

// GetAuthorizedEntries returns all entries of the calling agent in one message.
func (e *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	agent := callerOf(ctx)
	resp := &entryv1.GetAuthorizedEntriesResponse{}
	for _, r := range e.s.entries.authorized(agent) {
		resp.Entries = append(resp.Entries, r.masked(agent, req.OutputMask))
	}
	return resp, nil
}

// SyncAuthorizedEntries returns the entries of the calling agent whole when
// they fit a page. Otherwise it sends pages of revisions, and then, page by
// page, the entries that the agent asks for. What the agent sees is one state
// of the list throughout.
func (e *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	agent := callerOf(stream.Context())
	entries := e.s.entries.authorized(agent)
	req, err := stream.Recv()
	switch {
	case err != nil:
		return err
	case len(req.Ids) > 0:
		return status.Error(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	case req.OutputMask != nil && !req.OutputMask.RevisionNumber:
		// Without revisions a caller could not tell what it must ask for.
		return status.Error(codes.InvalidArgument, "revision number cannot be masked")
	}
	out := entrySender{stream: stream, agent: agent, mask: req.OutputMask}
	if len(entries) <= entryPage {
		return out.page(entries, false)
	}
	if err := sendRevisions(stream, entries); err != nil {
		return err
	}
	byID := make(map[string]*registration, len(entries))
	for _, r := range entries {
		byID[r.entry.Id] = r
	}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
			return nil // the agent has what it wants
		}
		if err != nil {
			return err
		}
		if err := out.asked(req.Ids, byID); err != nil {
			return err
		}
	}
}

func sendRevisions(stream entryv1.Entry_SyncAuthorizedEntriesServer, entries []*registration) error {
	for sent := 0; sent < len(entries); sent += entryPage {
		page := entries[sent:min(sent+entryPage, len(entries))]
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: sent+len(page) < len(entries)}
		for _, r := range page {
			resp.EntryRevisions = append(resp.EntryRevisions, &entryv1.EntryRevision{
				Id: r.entry.Id, RevisionNumber: r.entry.RevisionNumber, CreatedAt: r.entry.CreatedAt,
			})
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	return nil
}

// entrySender sends whole entries.
type entrySender struct {
	stream entryv1.Entry_SyncAuthorizedEntriesServer
	agent  spiffeid.ID
	mask   *types.EntryMask // of the first request; later ones do not count
}

// asked answers one request: the entries that exist, ordered by ID, and at
// least one page, if an empty one.
func (e *entrySender) asked(ids []string, byID map[string]*registration) error {
	slices.Sort(ids)
	var page []*registration
	for _, id := range ids {
		r, ok := byID[id]
		if !ok {
			continue
		}
		if len(page) == entryPage {
			if err := e.page(page, true); err != nil {
				return err
			}
			page = page[:0]
		}
		page = append(page, r)
	}
	return e.page(page, false)
}

func (e *entrySender) page(page []*registration, more bool) error {
	resp := &entryv1.SyncAuthorizedEntriesResponse{More: more}
	for _, r := range page {
		resp.Entries = append(resp.Entries, r.masked(e.agent, e.mask))
	}
	return e.stream.Send(resp)
}
