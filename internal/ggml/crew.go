package ggml

/*
#include <stdlib.h>
#include "crew.h"
*/
import "C"

import (
	"fmt"
	"sync"
	"time"
	"unsafe"
)

// Crew is threads that compute programs: lists of custom operations, whose results do not depend on the number of
// threads. The goroutine that calls Run is one of them; the others sleep while there is nothing to do. One goroutine at a
// time may use it, but for Stop. Close ends the threads.
type Crew struct {
	c    *C.struct_hone_crew
	lock sync.Mutex // of Stop and Close
}

// NewCrew starts a crew of so many threads, at least one.
func NewCrew(threads int) (*Crew, error) {
	threads = max(1, threads)
	c := C.hone_crew_new(C.int(threads))
	if c == nil {
		return nil, fmt.Errorf("start %d threads: %w", threads, ErrMemory)
	}
	return &Crew{c: c}, nil
}

// Run computes the program. It returns ErrAborted.
func (c *Crew) Run(p *Program) error { return c.run(p, nil) }

func (c *Crew) run(p *Program, times *C.int64_t) error {
	if len(p.nodes) > 0 && !bool(C.hone_crew_run(c.c, &p.nodes[0], C.int(len(p.nodes)), times)) {
		return ErrAborted
	}
	return nil
}

// Profile computes the program and returns what its nodes of each kind took.
func (c *Crew) Profile(p *Program) (map[string]Cost, error) {
	times := make([]C.int64_t, len(p.nodes)+1)
	if err := c.run(p, &times[0]); err != nil {
		return nil, err
	}
	costs := make(map[string]Cost)
	for i, kind := range p.kinds {
		cost := costs[kind]
		costs[kind] = Cost{kind, cost.Nodes + 1, cost.Time + time.Duration(times[i])}
	}
	return costs, nil
}

// Stop makes the running Run return ErrAborted after its current node, and later ones at once, until Stop(false). Any
// goroutine may call it.
func (c *Crew) Stop(stop bool) {
	c.lock.Lock()
	defer c.lock.Unlock()
	if c.c != nil {
		flag := C.int(0)
		if stop {
			flag = 1
		}
		C.hone_crew_stop(c.c, flag)
	}
}

// Close ends the threads; it may be called twice. No Run may be under way.
func (c *Crew) Close() {
	if c == nil {
		return
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	C.hone_crew_free(c.c)
	c.c = nil
}

// Program is custom operations in the order in which they are computed. Its tensors have their memory: see Tensor.SetMemory.
type Program struct {
	nodes []*C.struct_ggml_tensor
	kinds []string
}

// Add appends an operation, cut into so many tasks, and returns it.
func (p *Program) Add(t Tensor, kind string, tasks int) Tensor {
	t.c.op_params[C.HONE_TASKS] = C.int32_t(max(1, tasks))
	p.nodes, p.kinds = append(p.nodes, t.c), append(p.kinds, kind)
	return t
}

// AddCounted appends an operation whose last operand begins with the number of its tasks, an int32.
func (p *Program) AddCounted(t Tensor, kind string) Tensor {
	p.Add(t, kind, 1)
	t.c.op_params[C.HONE_TASKS] = C.HONE_TASKS_OF_SOURCE
	return t
}

// Nodes is the number of operations.
func (p *Program) Nodes() int { return len(p.nodes) }

// MemoryBytes is the size of its memory.
func (t Tensor) MemoryBytes() int { return int(t.c.nb[3] * C.size_t(t.c.ne[3])) }

// ShareMemory lets a tensor lie where another one begins, which is as large.
func (t Tensor) ShareMemory(with Tensor) { t.c.data = with.c.data }

// MemoryBytes is what Place takes for the context's tensors.
func (x *Context) MemoryBytes() int {
	bytes := 0
	for t := C.ggml_get_first_tensor(x.c); t != nil; t = C.ggml_get_next_tensor(x.c, t) {
		bytes += (Tensor{t}.MemoryBytes() + 63) / 64 * 64
	}
	return bytes
}

// Place gives the context's tensors memory outside of Go's heap, one behind the other.
func (x *Context) Place(memory []byte) {
	for t := C.ggml_get_first_tensor(x.c); t != nil; t = C.ggml_get_next_tensor(x.c, t) {
		Tensor{t}.SetMemory(memory)
		memory = memory[(Tensor{t}.MemoryBytes()+63)/64*64:]
	}
}

// SetMemory makes memory outside of Go's heap, which must stay where it is, that of a tensor that has none.
func (t Tensor) SetMemory(memory []byte) {
	if len(memory) < t.MemoryBytes() {
		panic(fmt.Sprintf("ggml: a tensor of %d bytes in %d", t.MemoryBytes(), len(memory)))
	}
	t.c.data = unsafe.Pointer(unsafe.SliceData(memory))
}
