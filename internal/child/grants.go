package child

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/dustin/go-humanize"

	"github.com/hone-llm/hone/internal/memory"
)

// Memory is the budget that runners, and trainers that compute on the CPU, share. Each plans within its grant, so that
// one does not grow into what another was promised and has not touched yet. Its methods may be called from any goroutine.
type Memory struct {
	fixed int64
	free  func() (int64, error)

	mu      sync.Mutex
	grants  []*Grant
	changed chan struct{} // closed, and replaced, when a grant shrinks or ends
}

// AutoShare is what an automatic budget takes of the memory that would be free without children; the rest is for the
// server itself, the page cache and other programs.
const AutoShare = 0.9

// NewMemory returns a budget of so many bytes. With 0 it is nine tenths of what is free, measured at each grant; the
// memory that children have of their own counts as free, as they are what is granted.
func NewMemory(bytes int64) *Memory {
	return &Memory{fixed: bytes, changed: make(chan struct{}), free: func() (int64, error) {
		machine, group, err := memory.Free()
		return min(machine, group), err
	}}
}

// bounded reports whether there is a bound at all.
func (m *Memory) bounded() bool { return m.fixed != math.MaxInt64 }

// Grant is a part of the budget that one child has.
type Grant struct {
	memory *Memory
	name   string
	bytes  int64 // of memory.mu, as pid
	pid    int   // 0: not started yet
}

// ShortError says that a grant does not fit now.
type ShortError struct {
	Name         string
	Need, Budget int64
	Taken        int64    // of the budget
	Takers       []string // who has it, with how much
}

func (e *ShortError) Error() string {
	text := fmt.Sprintf("%s needs about %s of memory, and the budget of all models and jobs is %s", e.Name, size(e.Need), size(e.Budget))
	if len(e.Takers) > 0 {
		text += fmt.Sprintf(", of which %s are taken (%s)", size(e.Taken), strings.Join(e.Takers, ", "))
	}
	return text
}

func size(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

// Reserve grants name so many bytes, or returns a *ShortError.
func (m *Memory) Reserve(name string, bytes int64) (*Grant, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	budget, err := m.budget()
	if err != nil {
		return nil, err
	}
	taken := m.taken()
	if bytes > budget-taken {
		short := &ShortError{Name: name, Need: bytes, Budget: budget, Taken: taken}
		for _, g := range m.grants {
			short.Takers = append(short.Takers, g.name+" "+size(g.bytes))
		}
		return nil, short
	}
	return m.grant(name, bytes), nil
}

// ReserveRest grants name all that is left, at most so many bytes (0: any number), and at least one.
func (m *Memory) ReserveRest(name string, most int64) (*Grant, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	budget, err := m.budget()
	if err != nil {
		return nil, err
	}
	rest := max(1, budget-m.taken())
	if most > 0 {
		rest = min(rest, most)
	}
	return m.grant(name, rest), nil
}

func (m *Memory) grant(name string, bytes int64) *Grant {
	g := &Grant{memory: m, name: name, bytes: bytes}
	m.grants = append(m.grants, g)
	return g
}

// Budget is what there is to grant, in bytes, and Taken what is granted of it.
func (m *Memory) Budget() (budget, taken int64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	budget, err = m.budget()
	return budget, m.taken(), err
}

func (m *Memory) budget() (int64, error) {
	if m.fixed > 0 {
		return m.fixed, nil
	}
	free, err := m.free()
	if err != nil {
		return 0, fmt.Errorf("how much memory is free is not known (%w); set memory: in the configuration", err)
	}
	for _, g := range m.grants {
		if g.pid == 0 {
			continue
		}
		if own, _, err := memory.Of(g.pid); err == nil { // one that has just ended has none
			free += own
		}
	}
	return int64(float64(free) * AutoShare), nil
}

func (m *Memory) taken() (sum int64) {
	for _, g := range m.grants {
		sum += g.bytes
	}
	return sum
}

// Changed returns a channel that is closed at the next moment at which a grant shrinks or ends.
func (m *Memory) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

func (m *Memory) change() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// Bytes is what is granted.
func (g *Grant) Bytes() int64 {
	g.memory.mu.Lock()
	defer g.memory.mu.Unlock()
	return g.bytes
}

// Use tells which process has the grant.
func (g *Grant) Use(pid int) {
	g.memory.mu.Lock()
	defer g.memory.mu.Unlock()
	g.pid = pid
}

// Resize sets the grant to what its child has planned or reports. It may grow beyond the budget: what is used is used.
func (g *Grant) Resize(bytes int64) {
	g.memory.mu.Lock()
	defer g.memory.mu.Unlock()
	g.bytes = max(0, bytes)
	g.memory.change()
}

// Release gives the grant back, once its child is gone. Releasing twice is releasing once.
func (g *Grant) Release() {
	g.memory.mu.Lock()
	defer g.memory.mu.Unlock()
	before := len(g.memory.grants)
	g.memory.grants = slices.DeleteFunc(g.memory.grants, func(other *Grant) bool { return other == g })
	if len(g.memory.grants) < before {
		g.memory.change()
	}
}
