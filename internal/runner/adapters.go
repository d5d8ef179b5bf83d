package runner

import (
	"fmt"
	"slices"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/llama"
)

// maxIdleAdapters is how many loaded adapters that no sequence uses are kept.
const maxIdleAdapters = 16

// adapter is a loaded adapter. Sequences, and what they leave in the prefix cache, are told apart by its address; the
// base model's adapter is nil.
type adapter struct {
	id, path string
	weights  *llama.Adapter

	users int   // sequences; guarded by adapters.mu, as all below
	gone  bool  // unloaded: freed with its last user
	used  int64 // of adapters.clock, for choosing which idle one goes
}

// adapters are the loaded adapters of a base model, by id.
type adapters struct {
	model     *llama.Model
	base      *gguf.File
	scheduler *scheduler

	mu    sync.Mutex
	byID  map[string]*adapter
	clock int64
}

func newAdapters(m *llama.Model, base *gguf.File, s *scheduler) *adapters {
	return &adapters{model: m, base: base, scheduler: s, byID: map[string]*adapter{}}
}

// acquire returns the adapter for one sequence, loading it if need be; release gives it back. An id with another path
// than before names a new adapter. The error is a *child.Error.
func (a *adapters) acquire(want child.Adapter) (*adapter, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clock++
	if have := a.byID[want.ID]; have != nil {
		if have.path == want.Path {
			have.users++
			have.used = a.clock
			return have, nil
		}
		a.remove(have)
	}
	weights, err := a.load(want.Path)
	if err != nil {
		return nil, &child.Error{Code: child.CodeInvalidAdapter, Message: fmt.Sprintf("adapter %q: %v", want.ID, err)}
	}
	loaded := &adapter{id: want.ID, path: want.Path, weights: weights, users: 1, used: a.clock}
	a.byID[want.ID] = loaded
	a.trim()
	return loaded, nil
}

func (a *adapters) load(path string) (*llama.Adapter, error) {
	file, err := gguf.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if err := gguf.CheckAdapter(file, a.base); err != nil {
		return nil, err
	}
	return llama.LoadAdapter(a.model, path)
}

func (a *adapters) release(x *adapter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x.users--
	if x.gone && x.users == 0 {
		a.scheduler.forget(x)
		return
	}
	a.trim()
}

// unload removes the adapter of this id and reports whether there was one.
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
	if x.users == 0 {
		a.scheduler.forget(x)
	}
}

// trim removes the adapters that have been idle longest, down to maxIdleAdapters.
func (a *adapters) trim() {
	for {
		var oldest *adapter
		idle := 0
		for _, x := range a.byID {
			if x.users > 0 {
				continue
			}
			idle++
			if oldest == nil || x.used < oldest.used {
				oldest = x
			}
		}
		if idle <= maxIdleAdapters {
			return
		}
		a.remove(oldest)
	}
}

func (a *adapters) ids() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	ids := make([]string, 0, len(a.byID))
	for id := range a.byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// free frees every adapter; the scheduler must have stopped and no sequence be left.
func (a *adapters) free() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, x := range a.byID {
		delete(a.byID, id)
		a.scheduler.forget(x)
	}
}
