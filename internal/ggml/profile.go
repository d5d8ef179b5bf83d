package ggml

/*
#include "kernels.h"
*/
import "C"

import (
	"fmt"
	"time"
)

// Cost is the time that the nodes of one kind take, each computed alone and waited for.
type Cost struct {
	Kind  string // operation, type of the first operand and shape: "MUL_MAT bf16 [4096 512]"
	Nodes int
	Time  time.Duration
}

// Profile computes the graph as Compute does, but node by node, and returns what each kind of node costs. Every node
// also pays for its own start and for the waiting, some 10 microseconds on a GPU, and none is fused with the next.
func (b *Backend) Profile(g *Graph, a *Allocator) (map[string]Cost, error) {
	if err := b.prepare(g, a); err != nil {
		return nil, err
	}
	costs := make(map[string]Cost)
	for i := range g.Nodes() {
		node := C.ggml_graph_node(g.c, C.int(i))
		x := NewContext(0, 1)
		one := x.NewGraph(1)
		C.ggml_graph_add_node(one.c, node)
		start := time.Now()
		err := b.compute(one)
		elapsed := time.Since(start)
		x.Free()
		if err != nil {
			return nil, err
		}
		kind := C.GoString(C.ggml_op_desc(node))
		if source := node.src[0]; source != nil {
			kind += " " + C.GoString(C.ggml_type_name(source._type))
		}
		kind = fmt.Sprintf("%s %v", kind, node.ne)
		c := costs[kind]
		costs[kind] = Cost{kind, c.Nodes + 1, c.Time + elapsed}
	}
	return costs, nil
}
