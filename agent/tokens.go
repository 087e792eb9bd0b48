package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

// JWTSVID implements endpoint.Tokens.
func (a *Agent) JWTSVID(ctx context.Context, entry *registry.Entry, audience []string) (*registry.Token, error) {
	token, err := a.client.NewJWTSVID(ctx, spire.JWTRequest{EntryID: entry.ID, SPIFFEID: entry.SPIFFEID, Audience: audience})
	if errors.Is(err, spire.ErrTokensOff) {
		return nil, fmt.Errorf("%w: %w", endpoint.ErrNoTokens, err)
	}
	return token, err
}

// WITSVID implements endpoint.Tokens.
func (a *Agent) WITSVID(context.Context, *registry.Entry) (*registry.Token, time.Time, error) {
	return nil, time.Time{}, fmt.Errorf("%w: WIT-SVIDs", endpoint.ErrNoTokens)
}
