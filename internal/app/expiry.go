package app

import (
	"context"
	"log/slog"
	"time"

	"github.com/hone-llm/hone/internal/store"
)

// expiryInterval is how often files and uploads whose time has come are looked for. Start does it too.
const expiryInterval = time.Minute

// expiry deletes files and ends uploads whose time has come.
type expiry struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func newExpiry(state *store.Store, logger *slog.Logger) *expiry {
	ctx, cancel := context.WithCancel(context.Background())
	e := &expiry{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		ticker := time.NewTicker(expiryInterval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				if err := state.Expire(ctx); err != nil && ctx.Err() == nil {
					logger.Error("expired files were not deleted; it is tried again", "error", err, "in", expiryInterval)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return e
}

// stop returns when nothing of it goes on.
func (e *expiry) stop() {
	e.cancel()
	<-e.done
}
