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
	"math"
	"strings"

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

// Shape is what a Llama-type model's metadata says.
type Shape struct {
	Layers, Embedding, FeedForward int
	Heads                          ggml.Heads
	Vocabulary                     int
	ContextTokens                  int // trained context
	Epsilon                        float32
	RopeBase, RopeScale            float32
	RopeDimensions                 int
}

// Parameters is the number of weights of the linear layers, without embedding and head.
func (s Shape) Parameters() int {
	d, q, kv := s.Embedding, s.Heads.Query*s.Heads.Size, s.Heads.KeyValue*s.Heads.Size
	return s.Layers * (2*d*q + 2*d*kv + 3*d*s.FeedForward)
}

// linear is a frozen weight matrix, kept twice: forward multiplies w, backward its transpose.
type linear struct {
	in, out int
	w, wt   ggml.Tensor // [in, out], [out, in]
}

type layer struct {
	attentionNorm, feedForwardNorm ggml.Tensor
	linears                        [modules]linear // by Module
}

// Model is a frozen base model on a backend. Close frees it.
type Model struct {
	Shape
	Layout

	backend   *ggml.Backend
	allocator *ggml.Allocator
	context   *ggml.Context
	buffer    *ggml.Buffer

	embedding   ggml.Tensor // as stored in the file
	layers      []layer
	norm        ggml.Tensor
	head        linear
	ropeFactors ggml.Tensor
}

// Layout says how the dequantised weights are stored: Forward those that the forward pass multiplies, Backward their
// transposes; each BF16 or F32.
type Layout struct{ Forward, Backward ggml.Type }

// ExactLayout computes the forward pass in float32, so that activations and losses are those of the weights as
// served, and the backward pass in the fastest type of the CPU. With BF16 in both, gradients of a 30-layer model are
// off by 2% in the mean and 5% at worst, with it in the backward pass alone by 0.6% and 1.4%.
func ExactLayout() Layout {
	if ggml.HasBF16() {
		return Layout{ggml.F32, ggml.BF16}
	}
	return Layout{ggml.F32, ggml.F32}
}

// SmallLayout takes 4 bytes a weight, and on CPUs without BF16 arithmetic is slow.
func SmallLayout() Layout { return Layout{ggml.BF16, ggml.BF16} }

// Load copies the weights of a model file to the backend, dequantised to the layout's types. A model that cannot be
// trained gives *UnsupportedError before memory is allocated; Shape.WeightBytes says how much it will take.
func Load(f *gguf.File, backend *ggml.Backend, layout Layout) (*Model, error) {
	shape, err := ReadShape(f)
	if err != nil {
		return nil, err
	}
	m := &Model{Shape: shape, Layout: layout, backend: backend}
	m.context = ggml.NewContext(shape.Layers*(2*int(modules)+2)+6, 0)
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
		l := linear{in: in, out: out, w: m.context.New(layout.Forward, in, out), wt: m.context.New(layout.Backward, out, in)}
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
	if _, ok := f.Tensor(headName); !ok {
		headName = "token_embd.weight" // tied
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
		}
	}
	if len(errs) > 0 {
		return fail(errors.Join(errs...))
	}
	if m.buffer, err = m.context.Allocate(backend); err != nil {
		return fail(err)
	}
	for _, fill := range fills {
		fill()
	}
	m.allocator = backend.NewAllocator()
	return m, nil
}

// fill stores the dequantised matrix [out, in] and its transpose, a band of rows at a time.
func (l linear) fill(data []byte, t ggml.Type) {
	const band = 64
	rowBytes := len(data) / l.out
	buffer := make([]float32, band*l.in)
	for row := 0; row < l.out; row += band {
		n := min(band, l.out-row)
		values := buffer[:n*l.in]
		ggml.Dequantize(values, t, data[row*rowBytes:(row+n)*rowBytes])
		l.w.SetRows(values, row*l.in)
		l.wt.SetTranspose(values, row, l.in, l.out)
	}
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

// WeightBytes is the memory that Load will allocate for a model of this shape, in bytes, embedding aside.
func (s Shape) WeightBytes(l Layout) int {
	bytes := 0
	for _, t := range []ggml.Type{l.Forward, l.Backward} {
		if t == ggml.BF16 {
			bytes += 2
		} else {
			bytes += 4
		}
	}
	return bytes * (s.Parameters() + s.Vocabulary*s.Embedding)
}

// TokenBytes estimates the memory that the graph of a micro-batch takes for each of its tokens: what the backward
// pass needs of every layer, in float32, with LoRA of the given rank on every module.
func (s Shape) TokenBytes(rank int) int {
	q, kv := s.Heads.Query*s.Heads.Size, s.Heads.KeyValue*s.Heads.Size
	kept := 2*s.Embedding + 2*q + 2*kv + 2*s.FeedForward + int(modules)*paddedRank(rank) // the last is A x of every module
	return 4 * (s.Layers*kept + 8*s.Embedding + 8*s.FeedForward)
}

// ReadShape reads and checks the metadata of a model that can be trained: architecture llama (also Mistral, SmolLM
// and the DeepSeek distillations of it), without experts, biases or YaRN scaling.
func ReadShape(f *gguf.File) (Shape, error) {
	architecture, _ := f.Metadata.String("general.architecture")
	if architecture != "llama" {
		return Shape{}, &UnsupportedError{"general.architecture", fmt.Sprintf("%q is not trainable, only llama is", architecture)}
	}
	var missing []string
	integer := func(key string) int {
		v, ok := f.Metadata.Int("llama." + key)
		if !ok || v <= 0 || v > math.MaxInt32 {
			missing = append(missing, key)
			return 1
		}
		return int(v)
	}
	optional := func(key string, fallback int) int {
		if v, ok := f.Metadata.Int("llama." + key); ok && v > 0 && v <= math.MaxInt32 {
			return int(v)
		}
		return fallback
	}
	s := Shape{
		Layers:        integer("block_count"),
		Embedding:     integer("embedding_length"),
		FeedForward:   integer("feed_forward_length"),
		ContextTokens: integer("context_length"),
		Heads:         ggml.Heads{Query: integer("attention.head_count")},
		RopeBase:      10000,
		RopeScale:     1,
	}
	epsilon, ok := f.Metadata.Float("llama.attention.layer_norm_rms_epsilon")
	if !ok {
		missing = append(missing, "attention.layer_norm_rms_epsilon")
	}
	if len(missing) > 0 {
		return Shape{}, &UnsupportedError{"metadata", "missing or not a positive number: llama." + strings.Join(missing, ", llama.")}
	}
	s.Epsilon = float32(epsilon)
	s.Heads.KeyValue = optional("attention.head_count_kv", s.Heads.Query)
	s.Heads.Size = optional("attention.key_length", s.Embedding/s.Heads.Query)
	s.RopeDimensions = optional("rope.dimension_count", s.Heads.Size)
	if base, ok := f.Metadata.Float("llama.rope.freq_base"); ok {
		s.RopeBase = float32(base)
	}
	switch kind, _ := f.Metadata.String("llama.rope.scaling.type"); kind {
	case "", "none":
	case "linear":
		factor, ok := f.Metadata.Float("llama.rope.scaling.factor")
		if !ok || factor <= 0 {
			return Shape{}, &UnsupportedError{"llama.rope.scaling.factor", "missing or not positive"}
		}
		s.RopeScale = float32(1 / factor)
	default:
		return Shape{}, &UnsupportedError{"llama.rope.scaling.type", fmt.Sprintf("%q is not trainable, only linear scaling is", kind)}
	}
	if embedding, ok := f.Tensor("token_embd.weight"); ok && len(embedding.Shape) == 2 {
		s.Vocabulary = int(embedding.Shape[1])
	}
	switch {
	case s.Vocabulary == 0:
		return Shape{}, &UnsupportedError{"token_embd.weight", "missing"}
	case s.Heads.Query%s.Heads.KeyValue != 0:
		return Shape{}, &UnsupportedError{"llama.attention.head_count_kv", fmt.Sprintf("%d does not divide %d query heads", s.Heads.KeyValue, s.Heads.Query)}
	case s.Embedding%16 != 0 || s.FeedForward%16 != 0 || s.Heads.Size%16 != 0:
		return Shape{}, &UnsupportedError{"metadata", fmt.Sprintf("embedding %d, feed-forward %d and head size %d must be multiples of 16", s.Embedding, s.FeedForward, s.Heads.Size)}
	case s.RopeDimensions > s.Heads.Size || s.RopeDimensions%2 != 0:
		return Shape{}, &UnsupportedError{"llama.rope.dimension_count", fmt.Sprintf("%d does not fit a head of %d", s.RopeDimensions, s.Heads.Size)}
	}
	if n, ok := f.Metadata.Int("llama.expert_count"); ok && n > 0 {
		return Shape{}, &UnsupportedError{"llama.expert_count", "mixtures of experts are not trainable"}
	}
	for _, t := range f.Tensors {
		if strings.HasSuffix(t.Name, ".bias") {
			return Shape{}, &UnsupportedError{t.Name, "biases are not trainable"}
		}
	}
	return s, nil
}
