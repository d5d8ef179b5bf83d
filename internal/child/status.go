package child

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
)

// RunnerStatus is what a runner says of its work: a part of package runner's Status.
type RunnerStatus struct {
	Model        string `json:"-"`
	Running      int    `json:"running"`     // sequences that are computed
	Waiting      int    `json:"waiting"`     // sequences that wait for their turn
	PoolTokens   int    `json:"pool_tokens"` // cells of the key-value cache
	FreeTokens   int    `json:"free_tokens"` // of these, cells that nothing holds
	CachedTokens int    `json:"cached_tokens"`
}

// Status asks the runners that are ready how much they have to do, all at once. Those that do not answer before ctx ends
// are left out.
func (r *Runners) Status(ctx context.Context) []RunnerStatus {
	r.mu.Lock()
	var ready []*life
	for l := range r.lives {
		if l.state == Ready && l.runner != nil && !l.runner.ended() {
			ready = append(ready, l)
		}
	}
	r.mu.Unlock()
	var mu sync.Mutex
	var asking sync.WaitGroup
	all := []RunnerStatus{}
	for _, l := range ready {
		asking.Go(func() {
			status, err := l.runner.Status(ctx)
			if err != nil {
				return
			}
			status.Model = l.base.Name
			mu.Lock()
			defer mu.Unlock()
			all = append(all, status)
		})
	}
	asking.Wait()
	slices.SortFunc(all, func(a, b RunnerStatus) int { return cmp.Compare(a.Model, b.Model) })
	return all
}

// Status asks the runner how much it has to do.
func (r *Runner) Status(ctx context.Context) (status RunnerStatus, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://runner/status", http.NoBody)
	if err != nil {
		return status, err
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return status, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return status, fmt.Errorf("the runner answered %s", resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxLineBytes)).Decode(&status); err != nil {
		return status, fmt.Errorf("read the runner's status: %w", err)
	}
	r.heard()
	return status, nil
}
