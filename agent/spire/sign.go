package spire

import (
	"context"
	"crypto"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
)

const (
	stepSign = "sign SVIDs"

	// maxBatch is what one BatchNewX509SVID may carry: the server counts
	// certificate requests, admits 500 a second from an IP address, and
	// answers ResourceExhausted to a call that could never be admitted.
	maxBatch = 500
)

// SignRequest asks for one workload's X509-SVID.
type SignRequest struct {
	EntryID string
	// SPIFFEID is the entry's. An answer for any other is not accepted.
	SPIFFEID spiffeid.ID
	// CSR is the certificate request, PKCS#10 in DER. The server uses its
	// key; the rest follows from the entry.
	CSR []byte
}

// Signed is the answer to one SignRequest.
type Signed struct {
	Chain [][]byte // DER certificates, leaf first; nil if Err is set
	// Err is why there is no SVID. It wraps ErrNotFound where the server no
	// longer has the entry, or not for this agent.
	Err error
}

// Sign has the server sign X509-SVIDs (BatchNewX509SVID), in calls of at most
// 500. The answer has one Signed for each request, in their order; each chain
// is for the request's key and SPIFFE ID. The chains are not verified against
// a bundle, which may be older than the authority that signed them: what
// vouches for them is the connection.
//
// The error is that of a call. What had been signed before it is returned
// with it, and Err of the others wraps it.
func (c *Client) Sign(ctx context.Context, reqs []SignRequest) ([]Signed, error) {
	signed := make([]Signed, len(reqs))
	batch := signBatch{signed: signed}
	var failed error
	for i, req := range reqs {
		key, err := csrKey(req.CSR)
		if err != nil {
			signed[i].Err = fmt.Errorf("%s: entry %s: %w", stepSign, req.EntryID, err)
			continue
		}
		batch.add(i, req, key)
		if len(batch.params) == maxBatch {
			failed = c.signBatch(ctx, &batch, failed)
		}
	}
	failed = c.signBatch(ctx, &batch, failed)
	return signed, failed
}

// signBatch is one call on its way: what is asked, and where the answers go.
type signBatch struct {
	params []*svidv1.NewX509SVIDParams
	wants  []signWant
	signed []Signed
}

type signWant struct {
	index int // in signed
	entry string
	id    spiffeid.ID
	key   crypto.PublicKey
}

func (b *signBatch) add(index int, req SignRequest, key crypto.PublicKey) {
	b.params = append(b.params, &svidv1.NewX509SVIDParams{EntryId: req.EntryID, Csr: req.CSR})
	b.wants = append(b.wants, signWant{index: index, entry: req.EntryID, id: req.SPIFFEID, key: key})
}

// signBatch makes the call, unless an earlier one has failed, and empties the
// batch. It returns what has failed so far.
func (c *Client) signBatch(ctx context.Context, b *signBatch, failed error) error {
	if failed == nil && len(b.params) > 0 {
		failed = c.call(ctx, stepSign, func(ctx context.Context, cn *conn) error {
			answer, err := svidv1.NewSVIDClient(cn.cc).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: b.params})
			if err != nil {
				return err
			}
			if got := len(answer.GetResults()); got != len(b.wants) {
				return badAnswer("%d results for %d requests", got, len(b.wants))
			}
			for i, want := range b.wants {
				b.signed[want.index] = c.signedResult(answer.GetResults()[i], want)
			}
			return nil
		})
	}
	if failed != nil {
		for _, want := range b.wants {
			b.signed[want.index].Err = failed
		}
	}
	b.params, b.wants = nil, nil
	return failed
}

func (c *Client) signedResult(result *svidv1.BatchNewX509SVIDResponse_Result, want signWant) Signed {
	e := &CallError{Step: stepSign + ": entry " + want.entry, Address: c.address}
	if code := codes.Code(result.GetStatus().GetCode()); code != codes.OK {
		e.Code, e.Message = code, result.GetStatus().GetMessage()
		if code == codes.NotFound {
			e.err = ErrNotFound
		} else {
			e.Message = code.String() + ": " + e.Message
		}
		return Signed{Err: e}
	}
	chain := result.GetSvid().GetCertChain()
	id, certs, err := parseSVID(chain, want.key)
	switch {
	case err != nil:
	case id != want.id:
		err = fmt.Errorf("it is for %s, want %s", id, want.id)
	case certs[0].IsCA:
		err = errors.New("it is an authority's certificate")
	default:
		return Signed{Chain: chain}
	}
	e.err = badAnswer("the SVID: %w", err)
	return Signed{Err: e}
}
