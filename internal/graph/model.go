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
	in, out   int
	kind      ggml.Type
	t         ggml.Tensor // ne order [in, out]; Packed: bytes
	transpose bool        // Stored: t is the transpose
	forward   bool        // its products are activations, which want precision, not gradients, which want range
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
	// Recompute makes the backward pass compute a layer's activations again from its input, which is all that the forward
	// pass then keeps: a sixth of the memory for 1,024 tokens of the default model, 29% to 36% more time, the same gradients.
	Recompute bool

	backend   *ggml.Backend
	blocks    blocks
	allocator *ggml.Allocator
	context   *ggml.Context
	buffer    *ggml.Buffer
	file      *gguf.File    // of Stored weights
	mapped    *ggml.Context // tensors in the file

	embedding   ggml.Tensor // as stored in the file
	layers      []layer
	norm        ggml.Tensor
	head        linear
	ropeFactors ggml.Tensor

	announced, ahead *ahead // the next micro-batch, and the one that is being made or ready

	inspect func(*ggml.Graph)     // tests look at a step's graph
	costs   *map[string]ggml.Cost // of the running Profile
}

// Load copies the weights of a model file to the backend, in the layout's types; the file's own mapping may be closed
// afterwards. A model that cannot be trained gives *UnsupportedError before memory is allocated; Estimate says how much
// it will take.
//
// A GPU computes the plain blocks. One backend is for one model: see ggml.OpenGPU.
func Load(f *gguf.File, backend *ggml.Backend, layout Layout) (*Model, error) {
	l, err := describe(f, backend, layout)
	if err != nil {
		return nil, err
	}
	m := l.model
	if m.buffer, err = m.context.Allocate(backend); err != nil {
		m.Close()
		return nil, fmt.Errorf("weights: %w", err)
	}
	m.buffer.Weights()
	inParallel(l.fills)
	return m, nil
}

// loader is a model whose tensors have no memory yet.
type loader struct {
	model *Model
	fills []func() // give the tensors their values
	errs  []error
}

func describe(f *gguf.File, backend *ggml.Backend, layout Layout) (*loader, error) {
	shape, err := ReadShape(f)
	if err != nil {
		return nil, err
	}
	tensors := shape.Layers*(2*int(modules)+7) + 6
	m := &Model{Shape: shape, Layout: layout, backend: backend, blocks: fused{}, context: ggml.NewContext(tensors, 0), mapped: ggml.NewContext(tensors, 0), allocator: backend.NewAllocator()}
	if backend.GPU() {
		m.blocks = newPlain(backend)
	}
	l := &loader{model: m}
	if m.file, err = gguf.Open(f.Path); err != nil {
		m.Close()
		return nil, err
	}
	if m.embedding, err = l.pickable("token_embd.weight", shape.Embedding, shape.Vocabulary); err != nil {
		l.errs = append(l.errs, err)
	}
	head := "output.weight"
	if shape.TiedHead {
		head = "token_embd.weight"
	}
	m.head = l.matrix(head, shape.Embedding, shape.Vocabulary)
	m.norm = l.vector("output_norm.weight", shape.Embedding)
	if _, ok := f.Tensor("rope_freqs.weight"); ok {
		m.ropeFactors = l.vector("rope_freqs.weight", shape.RopeDimensions/2)
	}
	m.layers = make([]layer, shape.Layers)
	for i := range m.layers {
		block, name := &m.layers[i], func(suffix string) string { return fmt.Sprintf("blk.%d.%s", i, suffix) }
		block.attentionNorm = l.vector(name("attn_norm.weight"), shape.Embedding)
		block.feedForwardNorm = l.vector(name("ffn_norm.weight"), shape.Embedding)
		for module := range modules {
			in, out := shape.moduleSize(module)
			block.linears[module] = l.matrix(name(module.TensorName()+".weight"), in, out)
			if shape.architecture.bias && module <= Value {
				block.bias[module] = l.vector(name(module.TensorName()+".bias"), out)
			}
			if shape.architecture.headNorm && module <= Key {
				block.headNorm[module] = l.vector(name(module.TensorName()+"_norm.weight"), shape.Heads.Size)
			}
		}
	}
	if len(l.errs) > 0 {
		m.Close()
		return nil, errors.Join(l.errs...)
	}
	return l, nil
}

func (l *loader) vector(name string, n int) ggml.Tensor {
	m := l.model
	src, ok := m.file.Tensor(name)
	if !ok || src.Elements() != int64(n) || src.Type != gguf.F32 {
		l.errs = append(l.errs, &UnsupportedError{name, fmt.Sprintf("expected %d float32 values", n)})
		return ggml.Tensor{}
	}
	t := m.context.New(ggml.F32, n)
	l.fills = append(l.fills, func() { t.SetBytes(m.file.Data(src), 0) })
	return t
}

// stored is a matrix as it is in the file: on the CPU in the file, else a copy.
func (l *loader) stored(name string, in, out int) (ggml.Tensor, error) {
	m := l.model
	src, ok := m.file.Tensor(name)
	if !ok || len(src.Shape) != 2 || src.Shape[0] != int64(in) || src.Shape[1] != int64(out) {
		return ggml.Tensor{}, &UnsupportedError{name, fmt.Sprintf("expected a matrix of %d x %d", in, out)}
	}
	if !m.backend.GPU() {
		return m.mapped.NewAt(ggml.Type(src.Type), m.file.Data(src), in, out), nil
	}
	t := m.context.New(ggml.Type(src.Type), in, out)
	l.fills = append(l.fills, func() { t.SetBytes(m.file.Data(src), 0) })
	return t, nil
}

func (l *loader) matrix(name string, in, out int) linear {
	m := l.model
	pair := linear{m.weight(m.Forward, in, out), m.weight(m.Backward, out, in)}
	pair.w.forward = true
	src, ok := m.file.Tensor(name)
	var err error
	if m.Forward == Stored || m.Backward == Stored || !ok {
		var t ggml.Tensor
		t, err = l.stored(name, in, out)
		pair.store(t)
	} else if len(src.Shape) != 2 || src.Shape[0] != int64(in) || src.Shape[1] != int64(out) {
		err = &UnsupportedError{name, fmt.Sprintf("expected a matrix of %d x %d", in, out)}
	}
	if err != nil {
		l.errs = append(l.errs, err)
	} else if m.Forward != Stored || m.Backward != Stored {
		if m.backend.GPU() {
			l.fills = append(l.fills, pair.uploads(m.file.Data(src), ggml.Type(src.Type))...)
			return pair
		}
		l.fills = append(l.fills, func() {
			pair.fill(m.file.Data(src), ggml.Type(src.Type))
			m.file.Forget(src) // or it would be in memory twice
		})
	}
	return pair
}

func (m *Model) weight(kind ggml.Type, in, out int) weight {
	w := weight{in: in, out: out, kind: kind}
	switch kind {
	case Stored:
	case Packed:
		w.t = m.context.New(ggml.I8, ggml.PackedBytes(in, out))
	default:
		w.t = m.context.New(kind, in, out)
	}
	return w
}

// store gives the matrix as it is in the file to those of the two that are Stored.
func (l *linear) store(t ggml.Tensor) {
	if l.w.kind == Stored {
		l.w.t = t
	}
	if l.wt.kind == Stored {
		l.wt.t, l.wt.transpose = t, true
	}
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
		switch l.w.kind {
		case Stored:
		case Packed:
			l.w.t.SetPackedRows(values, row, in, out)
		default:
			l.w.t.SetRows(values, row*in)
		}
		switch l.wt.kind {
		case Stored:
		case Packed:
			l.wt.t.SetPackedTranspose(values, row, in, out)
		default:
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
	m.dropAhead()
	m.allocator.Free()
	m.blocks.close()
	m.buffer.Free()
	m.context.Free()
	m.mapped.Free()
	m.file.Close()
}

// ActivationBytes is the memory that the graphs so far have needed.
func (m *Model) ActivationBytes() int { return m.allocator.Size() }

// LimitActivations makes a micro-batch whose graph takes more bytes end with ggml.ErrMemory before anything is computed;
// 0 lifts the limit.
func (m *Model) LimitActivations(bytes int) { m.allocator.Limit = bytes }
