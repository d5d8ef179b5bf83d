// Package graph holds model architectures as ggml graphs for training: the frozen base model in the layout that the
// device multiplies fastest, LoRA beside it, and one hand-built graph of forward and backward per micro-batch.
//
//	model, err := graph.Load(file, backend)      // file: *gguf.File, the model as it is served
//	lora, err := model.NewLoRA(graph.LoRAOptions{Rank: 16, Alpha: 32, Modules: graph.AllLinear})
//	result, err := model.Gradients(batch, lora, 1) // adds to lora.Gradients
//
// The graph is rebuilt for every micro-batch (a few milliseconds against seconds), so rows of any length are packed
// without padding. A micro-batch is computed on one goroutine at a time.
package graph

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// UnsupportedError says why a model cannot be trained: What names the part of the file.
type UnsupportedError struct {
	What, Reason string
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("cannot train this model: %s: %s", e.What, e.Reason)
}

// weight is a frozen matrix of a layout's type, in the form that one direction multiplies: y = W x with x [in, T].
type weight struct {
	in, out int
	kind    ggml.Type
	t       ggml.Tensor // ne order [in, out]; Packed: bytes
}

// linear is a frozen weight matrix, kept twice: forward multiplies w, backward its transpose.
type linear struct{ w, wt weight }

type layer struct {
	attentionNorm, feedForwardNorm ggml.Tensor
	linears                        [modules]linear      // by Module
	bias                           [modules]ggml.Tensor // of q, k, v where the architecture has them
	headNorm                       [modules]ggml.Tensor // of q and k where the architecture has them
}

// Model is a frozen base model on a backend. Close frees it.
type Model struct {
	Shape
	Layout

	backend   *ggml.Backend
	blocks    blocks
	allocator *ggml.Allocator
	context   *ggml.Context
	buffer    *ggml.Buffer

	embedding   ggml.Tensor // as stored in the file
	layers      []layer
	norm        ggml.Tensor
	head        linear
	ropeFactors ggml.Tensor
}

// Load copies the weights of a model file to the backend, dequantised to the layout's types. A model that cannot be
// trained gives *UnsupportedError before memory is allocated; Shape.WeightBytes says how much it will take.
func Load(f *gguf.File, backend *ggml.Backend, layout Layout) (*Model, error) {
	shape, err := ReadShape(f)
	if err != nil {
		return nil, err
	}
	m := &Model{Shape: shape, Layout: layout, backend: backend, blocks: fused{}}
	m.context = ggml.NewContext(shape.Layers*(2*int(modules)+7)+6, 0)
	var fills []func()
	fail := func(err error) (*Model, error) {
		m.context.Free()
		return nil, err
	}
	vector := func(name string, n int) (ggml.Tensor, error) {
		src, ok := f.Tensor(name)
		if !ok || src.Elements() != int64(n) || src.Type != gguf.F32 {
			return ggml.Tensor{}, &UnsupportedError{name, fmt.Sprintf("expected %d float32 values", n)}
		}
		t := m.context.New(ggml.F32, n)
		fills = append(fills, func() { ggml.Dequantize(t.Floats(), ggml.F32, f.Data(src)) })
		return t, nil
	}
	matrix := func(name string, in, out int) (linear, error) {
		src, ok := f.Tensor(name)
		if !ok || len(src.Shape) != 2 || src.Shape[0] != int64(in) || src.Shape[1] != int64(out) {
			return linear{}, &UnsupportedError{name, fmt.Sprintf("expected a matrix of %d x %d", in, out)}
		}
		if !ggml.Dequantizable(ggml.Type(src.Type)) {
			return linear{}, &UnsupportedError{name, fmt.Sprintf("type %s cannot be dequantised", src.Type)}
		}
		l := linear{m.weight(layout.Forward, in, out), m.weight(layout.Backward, out, in)}
		fills = append(fills, func() { l.fill(f.Data(src), ggml.Type(src.Type)) })
		return l, nil
	}
	embedding, ok := f.Tensor("token_embd.weight")
	if !ok {
		return fail(&UnsupportedError{"token_embd.weight", "missing"})
	}
	m.embedding = m.context.New(ggml.Type(embedding.Type), shape.Embedding, shape.Vocabulary)
	fills = append(fills, func() { copy(m.embedding.Bytes(int(embedding.Bytes)), f.Data(embedding)) })
	headName := "output.weight"
	if shape.TiedHead {
		headName = "token_embd.weight"
	}
	var errs []error
	collect := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	m.head, err = matrix(headName, shape.Embedding, shape.Vocabulary)
	collect(err)
	m.norm, err = vector("output_norm.weight", shape.Embedding)
	collect(err)
	if src, ok := f.Tensor("rope_freqs.weight"); ok {
		m.ropeFactors, err = vector(src.Name, shape.RopeDimensions/2)
		collect(err)
	}
	m.layers = make([]layer, shape.Layers)
	for i := range m.layers {
		l := &m.layers[i]
		l.attentionNorm, err = vector(fmt.Sprintf("blk.%d.attn_norm.weight", i), shape.Embedding)
		collect(err)
		l.feedForwardNorm, err = vector(fmt.Sprintf("blk.%d.ffn_norm.weight", i), shape.Embedding)
		collect(err)
		for module := range modules {
			in, out := shape.moduleSize(module)
			l.linears[module], err = matrix(fmt.Sprintf("blk.%d.%s.weight", i, module.TensorName()), in, out)
			collect(err)
			if shape.architecture.bias && module <= Value {
				l.bias[module], err = vector(fmt.Sprintf("blk.%d.%s.bias", i, module.TensorName()), out)
				collect(err)
			}
			if shape.architecture.headNorm && module <= Key {
				l.headNorm[module], err = vector(fmt.Sprintf("blk.%d.%s_norm.weight", i, module.TensorName()), shape.Heads.Size)
				collect(err)
			}
		}
	}
	if len(errs) > 0 {
		return fail(errors.Join(errs...))
	}
	if m.buffer, err = m.context.Allocate(backend); err != nil {
		return fail(err)
	}
	inParallel(fills)
	m.allocator = backend.NewAllocator()
	return m, nil
}

func (m *Model) weight(kind ggml.Type, in, out int) weight {
	if kind == Packed {
		return weight{in, out, kind, m.context.New(ggml.I8, ggml.PackedBytes(in, out))}
	}
	return weight{in, out, kind, m.context.New(kind, in, out)}
}

// fill stores the dequantised matrix [out, in] and its transpose, a band of rows at a time.
func (l linear) fill(data []byte, t ggml.Type) {
	const band = 64
	in, out := l.w.in, l.w.out
	rowBytes := len(data) / out
	buffer := make([]float32, band*in)
	for row := 0; row < out; row += band {
		n := min(band, out-row)
		values := buffer[:n*in]
		ggml.Dequantize(values, t, data[row*rowBytes:(row+n)*rowBytes])
		if l.w.kind == Packed {
			l.w.t.SetPackedRows(values, row, in, out)
		} else {
			l.w.t.SetRows(values, row*in)
		}
		if l.wt.kind == Packed {
			l.wt.t.SetPackedTranspose(values, row, in, out)
		} else {
			l.wt.t.SetTranspose(values, row, in, out)
		}
	}
}

// inParallel calls all functions, several at a time.
func inParallel(functions []func()) {
	var wait sync.WaitGroup
	limit := make(chan struct{}, runtime.GOMAXPROCS(0))
	for _, f := range functions {
		limit <- struct{}{}
		wait.Go(func() {
			f()
			<-limit
		})
	}
	wait.Wait()
}

// Close frees the model's memory; it may be called twice. Its LoRAs must be closed before.
func (m *Model) Close() {
	if m == nil {
		return
	}
	m.allocator.Free()
	m.buffer.Free()
	m.context.Free()
}

// ActivationBytes is the memory that the largest graph so far took.
func (m *Model) ActivationBytes() int { return m.allocator.Size() }

// TokenBytes estimates the memory that the graph of a micro-batch takes for each of its tokens: what the backward
// pass needs of every layer, in float32, with LoRA of the given rank on every module.
func (s Shape) TokenBytes(rank int) int {
	q, kv := s.Heads.Query*s.Heads.Size, s.Heads.KeyValue*s.Heads.Size
	kept := 2*s.Embedding + 2*q + 2*kv + 2*s.FeedForward + int(modules)*paddedRank(rank) // the last is A x of every module
	return 4 * (s.Layers*kept + 8*s.Embedding + 8*s.FeedForward)
}
