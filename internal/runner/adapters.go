package runner

import (
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/engine"
)

// adapter is a LoRA adapter that requests have named. Sequences, and what they leave in the prefix cache, are told apart
// by its address; the base model's adapter is nil.
type adapter struct {
	id, path string
	sha256   string // of the file; "": any

	// Guarded by adapters.mu.
	users   int            // requests
	holders int            // sequences that have a place, or soon will: its weights stay
	gone    bool           // unloaded: forgotten with its last user
	loading bool           // in a goroutine
	loaded  engine.Adapter // nil: not in memory
	err     error          // why it cannot be loaded
	used    int64          // of adapters.clock, for choosing which idle one goes
}

// adapters are the adapters of a base model. Weights are loaded when a sequence's turn comes near, in a goroutine of
// their own, and dropped when the memory is over its budget and no sequence holds them; freeing them is the scheduler's.
type adapters struct {
	scheduler *scheduler
	budget    int64 // bytes
	check     func(path string) error

	mu     sync.Mutex
	byID   map[string]*adapter
	bytes  int64 // loaded
	clock  int64
	loads  sync.WaitGroup
	closed bool
}

func newAdapters(s *scheduler, budget int64) *adapters {
	return &adapters{scheduler: s, budget: budget, byID: map[string]*adapter{}, check: func(string) error { return nil }}
}

// acquire returns the adapter for one request; release gives it back. An id with another path than before names a new
// adapter. Nothing is loaded yet.
func (a *adapters) acquire(want child.Adapter) *adapter {
	a.mu.Lock()
	defer a.mu.Unlock()
	have := a.byID[want.ID]
	if have != nil && have.path != want.Path {
		a.remove(have)
		have = nil
	}
	if have == nil {
		have = &adapter{id: want.ID, path: want.Path, sha256: want.SHA256}
		a.byID[want.ID] = have
	}
	have.users++
	return have
}

func (a *adapters) release(x *adapter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x.users--
	a.settle(x)
}

// hold keeps the adapter's weights in memory until drop, and begins to load them if they are not there.
func (a *adapters) hold(x *adapter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clock++
	x.used = a.clock
	x.holders++
	if x.loaded != nil || x.loading || x.err != nil || a.closed {
		return
	}
	x.loading = true
	a.loads.Go(func() {
		loaded, err := a.load(x.path, x.sha256)
		a.mu.Lock()
		defer a.mu.Unlock()
		x.loading, x.loaded = false, loaded
		if err != nil {
			x.err = &child.Error{Code: child.CodeInvalidAdapter, Message: fmt.Sprintf("adapter %q: %v", x.id, err)}
			if a.byID[x.id] == x { // a later request tries again
				delete(a.byID, x.id)
				x.gone = true
			}
		} else {
			a.bytes += int64(loaded.Bytes())
		}
		a.settle(x)
		a.trim()
		a.scheduler.notify()
	})
}

// load reads every byte first: a changed one may pass for a weight.
func (a *adapters) load(path, sha256 string) (engine.Adapter, error) {
	if sha256 != "" {
		got, err := durable.Digest(path)
		if err != nil {
			return nil, err
		}
		if got != sha256 {
			return nil, fmt.Errorf("%s is damaged: it has sha256 %.12s and not %.12s; restore it, or delete the adapter and train again", filepath.Base(path), got, sha256)
		}
	}
	if err := a.check(path); err != nil {
		return nil, err
	}
	return a.scheduler.decoder.LoadAdapter(path)
}

// drop ends a hold.
func (a *adapters) drop(x *adapter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x.holders--
	a.trim()
}

// weights returns the adapter's weights, nil while they are loading, or why they cannot be loaded: a *child.Error.
func (a *adapters) weights(x *adapter) (engine.Adapter, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return x.loaded, x.err
}

// unload removes the adapter of this id and reports whether there was one. One that is in use goes with its last user.
func (a *adapters) unload(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	x := a.byID[id]
	if x == nil {
		return false
	}
	a.remove(x)
	return true
}

func (a *adapters) remove(x *adapter) {
	delete(a.byID, x.id)
	x.gone = true
	a.settle(x)
}

// settle forgets an adapter that is gone and that nobody uses any more.
func (a *adapters) settle(x *adapter) {
	if x.gone && x.users == 0 && !x.loading {
		a.free(x, true)
	}
}

// trim drops the weights that have been idle longest while there are more bytes than the budget.
func (a *adapters) trim() {
	for a.bytes > a.budget {
		var oldest *adapter
		for _, x := range a.byID {
			if x.loaded != nil && x.holders == 0 && (oldest == nil || x.used < oldest.used) {
				oldest = x
			}
		}
		if oldest == nil {
			return
		}
		forget := oldest.users == 0
		if forget {
			delete(a.byID, oldest.id)
			oldest.gone = true
		}
		a.free(oldest, forget)
	}
}

// free gives the adapter's weights back between two steps, and with forget what they have computed in the prefix cache.
func (a *adapters) free(x *adapter, forget bool) {
	weights := x.loaded
	x.loaded = nil
	if weights != nil {
		a.bytes -= int64(weights.Bytes())
	}
	s := a.scheduler
	running := s.later(func() {
		if forget {
			s.forget(x)
		}
		if weights != nil {
			weights.Close()
		}
	})
	if !running && weights != nil { // nor does the decoder
		weights.Close()
	}
}

// inMemory returns the adapters whose weights are in memory, and how many bytes they take.
func (a *adapters) inMemory() (ids []string, bytes int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ids = []string{}
	for id, x := range a.byID {
		if x.loaded != nil {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, a.bytes
}

// close waits for what is loading and frees everything; the scheduler must have stopped and no request be left.
func (a *adapters) close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.loads.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, x := range a.byID {
		delete(a.byID, id)
		x.gone = true
		a.free(x, false)
	}
}
