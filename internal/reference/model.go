// Package reference is the training step in plain Go: slow loops in float64, one function for each formula, written to
// be read beside the papers. It is the oracle of the tests of the real engines, and itself checked by finite
// differences (step_test.go) and against PyTorch (golden_test.go).
//
//	model, err := reference.Load(file)                        // file: *gguf.File
//	lora := model.NewLoRA(8, 2, reference.Sites(model.Layers, reference.Query, reference.Value))
//	result, err := model.Gradients(batch, lora, 1)            // adds to lora.Pairs[...].GradA and GradB
//
// Read step.go first: Forward, block, Backward, blockBack are the whole of it. Shapes in comments are [rows, columns];
// T tokens, D embedding, F feed-forward, V vocabulary.
package reference

import (
	"fmt"
	"slices"

	"github.com/hone-llm/hone/internal/gguf"
)

// Matrix is rows of equal length: activations have a row for each token, weights a row for each output.
type Matrix [][]float64

// NewMatrix is a matrix of zeros.
func NewMatrix(rows, columns int) Matrix {
	m := make(Matrix, rows)
	for i := range m {
		m[i] = make([]float64, columns)
	}
	return m
}

// Shape is what the metadata of a model file says.
type Shape struct {
	Layers, Embedding, FeedForward, Vocabulary int
	QueryHeads, KeyHeads, HeadSize             int // KeyHeads divides QueryHeads
	Epsilon                                    float64
	RopeDimensions                             int     // elements of a head that are rotated
	RopeBase, RopeScale                        float64 // RopeScale is 1, or 1/factor of linear scaling
	RopeHalves                                 bool    // pairs are (i, i+n/2) instead of (2i, 2i+1)
}

// Module is one of the seven linear layers of a block, by its Hugging Face name.
type Module string

// The modules of a block.
const (
	Query  Module = "q_proj"
	Key    Module = "k_proj"
	Value  Module = "v_proj"
	Output Module = "o_proj"
	Gate   Module = "gate_proj"
	Up     Module = "up_proj"
	Down   Module = "down_proj"
)

// Modules are all of them: PEFT's "all-linear", in the order of the hash of Dropout.
var Modules = []Module{Query, Key, Value, Output, Gate, Up, Down}

var fileNames = map[Module]string{
	Query: "attn_q", Key: "attn_k", Value: "attn_v", Output: "attn_output", Gate: "ffn_gate", Up: "ffn_up", Down: "ffn_down",
}

// linear is y = W x + bias.
type linear struct {
	w    Matrix    // [out, in]
	bias []float64 // [out], or nil
}

type layer struct {
	attentionNorm, feedForwardNorm []float64 // [D]
	queryNorm, keyNorm             []float64 // [HeadSize], or nil: Qwen3 has them
	linears                        map[Module]linear
}

// Model is a frozen base model.
type Model struct {
	Shape
	embedding   Matrix // [V, D]
	layers      []layer
	norm        []float64 // [D]
	head        Matrix    // [V, D]; the embedding where the file has no head of its own
	ropeFactors []float64 // [RopeDimensions/2] divisors of the frequencies (Llama 3), or nil
}

// Load expands a model of architecture llama, qwen2 or qwen3 to float64. What it does not compute is an error that names
// the key or the tensor.
func Load(f *gguf.File) (*Model, error) {
	shape, err := readShape(f)
	if err != nil {
		return nil, err
	}
	m := &Model{Shape: shape, layers: make([]layer, shape.Layers)}
	keep := func(e error) {
		if err == nil {
			err = e
		}
	}
	matrix := func(name string, out, in int) Matrix {
		values, e := read(f, name, out*in)
		keep(e)
		return slices.Collect(slices.Chunk(values, in))
	}
	vector := func(name string, n int) []float64 {
		values, e := read(f, name, n)
		keep(e)
		return values
	}
	optional := func(name string, n int) []float64 {
		if _, ok := f.Tensor(name); !ok {
			return nil
		}
		return vector(name, n)
	}
	m.embedding = matrix("token_embd.weight", m.Vocabulary, m.Embedding)
	m.head = m.embedding
	if _, untied := f.Tensor("output.weight"); untied {
		m.head = matrix("output.weight", m.Vocabulary, m.Embedding)
	}
	m.norm = vector("output_norm.weight", m.Embedding)
	m.ropeFactors = optional("rope_freqs.weight", m.RopeDimensions/2)
	for i := range m.layers {
		prefix := fmt.Sprintf("blk.%d.", i)
		l := &m.layers[i]
		l.attentionNorm = vector(prefix+"attn_norm.weight", m.Embedding)
		l.feedForwardNorm = vector(prefix+"ffn_norm.weight", m.Embedding)
		l.queryNorm = optional(prefix+"attn_q_norm.weight", m.HeadSize)
		l.keyNorm = optional(prefix+"attn_k_norm.weight", m.HeadSize)
		l.linears = map[Module]linear{}
		for _, module := range Modules {
			in, out := m.moduleSize(module)
			name := prefix + fileNames[module]
			l.linears[module] = linear{matrix(name+".weight", out, in), optional(name+".bias", out)}
		}
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

func readShape(f *gguf.File) (Shape, error) {
	architecture, _ := f.Metadata.String("general.architecture")
	if !slices.Contains([]string{"llama", "qwen2", "qwen3"}, architecture) {
		return Shape{}, fmt.Errorf("general.architecture: %q, expected llama, qwen2 or qwen3", architecture)
	}
	number := func(key string, fallback int) int {
		if n, ok := f.Metadata.Int(architecture + "." + key); ok {
			return int(n)
		}
		return fallback
	}
	float := func(key string, fallback float64) float64 {
		if x, ok := f.Metadata.Float(architecture + "." + key); ok {
			return x
		}
		return fallback
	}
	s := Shape{
		Layers: number("block_count", 0), Embedding: number("embedding_length", 0), FeedForward: number("feed_forward_length", 0),
		QueryHeads: number("attention.head_count", 0), Epsilon: float("attention.layer_norm_rms_epsilon", 0),
		RopeBase: float("rope.freq_base", 10000), RopeScale: 1, RopeHalves: architecture != "llama",
	}
	if s.Layers < 1 || s.Embedding < 1 || s.FeedForward < 1 || s.QueryHeads < 1 || s.Epsilon <= 0 {
		return Shape{}, fmt.Errorf("metadata: block_count, embedding_length, feed_forward_length, attention.head_count or layer_norm_rms_epsilon of %s is missing or not positive", architecture)
	}
	s.KeyHeads = number("attention.head_count_kv", s.QueryHeads)
	s.HeadSize = number("attention.key_length", s.Embedding/s.QueryHeads)
	s.RopeDimensions = number("rope.dimension_count", s.HeadSize)
	if s.KeyHeads < 1 || s.QueryHeads%s.KeyHeads != 0 || s.RopeDimensions%2 != 0 || s.RopeDimensions > s.HeadSize {
		return Shape{}, fmt.Errorf("metadata: %d query heads over %d key-value heads of size %d, %d of it rotated", s.QueryHeads, s.KeyHeads, s.HeadSize, s.RopeDimensions)
	}
	switch scaling, _ := f.Metadata.String(architecture + ".rope.scaling.type"); scaling {
	case "", "none":
	case "linear":
		s.RopeScale = 1 / float("rope.scaling.factor", 1)
	default:
		return Shape{}, fmt.Errorf("%s.rope.scaling.type: %q, expected linear", architecture, scaling)
	}
	if number("expert_count", 0) > 0 {
		return Shape{}, fmt.Errorf("%s.expert_count: mixtures of experts are not computed", architecture)
	}
	embedding, ok := f.Tensor("token_embd.weight")
	if !ok || len(embedding.Shape) != 2 {
		return Shape{}, fmt.Errorf("tensor %q: missing or no matrix", "token_embd.weight")
	}
	s.Vocabulary = int(embedding.Shape[1])
	return s, nil
}

func (s Shape) moduleSize(m Module) (in, out int) {
	q, kv := s.QueryHeads*s.HeadSize, s.KeyHeads*s.HeadSize
	switch m {
	case Query:
		return s.Embedding, q
	case Key, Value:
		return s.Embedding, kv
	case Output:
		return q, s.Embedding
	case Down:
		return s.FeedForward, s.Embedding
	default:
		return s.Embedding, s.FeedForward
	}
}
