package graph

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// architecture is what one family of models does otherwise than the others: everything else is in the blocks that they
// share (step.go). Each has a file of its own, which also says whose code it follows.
type architecture struct {
	name     string // general.architecture, and the prefix of its metadata
	neoX     bool   // rotary embedding pairs the halves of a head, as Hugging Face does, instead of neighbours
	bias     bool   // q, k and v have a bias
	headNorm bool   // RMSNorm of each head of q and k before rotation
}

var architectures = []*architecture{&llama, &qwen2, &qwen3}

// extra says whether the architecture reads the tensor of this suffix ("attn_q.bias") in a block.
func (a *architecture) extra(suffix string) bool {
	switch suffix {
	case "attn_q.bias", "attn_k.bias", "attn_v.bias":
		return a.bias
	case "attn_q_norm.weight", "attn_k_norm.weight":
		return a.headNorm
	}
	return !strings.HasSuffix(suffix, ".bias")
}

// Shape is what a model's metadata says.
type Shape struct {
	Layers, Embedding, FeedForward int
	Heads                          ggml.Heads
	Vocabulary                     int
	ContextTokens                  int // trained context
	Epsilon                        float32
	RopeBase, RopeScale            float32
	RopeDimensions                 int
	TiedHead                       bool // the head multiplies by the embedding matrix

	architecture *architecture
}

// Parameters is the number of weights of the linear layers, without embedding and head.
func (s Shape) Parameters() int {
	d, q, kv := s.Embedding, s.Heads.Query*s.Heads.Size, s.Heads.KeyValue*s.Heads.Size
	return s.Layers * (2*d*q + 2*d*kv + 3*d*s.FeedForward)
}

// weightTypes are the types of a file's weights that can be trained on.
var weightTypes = []gguf.Type{
	gguf.F32, gguf.F16, gguf.BF16, gguf.Q8_0, gguf.Q6K, gguf.Q5K, gguf.Q5_0, gguf.Q5_1, gguf.Q4K, gguf.Q4_0, gguf.Q4_1, gguf.IQ4NL,
}

// ReadShape reads and checks the metadata and the tensor types of a model that can be trained. Its error is an
// *UnsupportedError, which names the field or the tensor.
func ReadShape(f *gguf.File) (Shape, error) {
	name, _ := f.Metadata.String("general.architecture")
	index := slices.IndexFunc(architectures, func(a *architecture) bool { return a.name == name })
	if index < 0 {
		var names []string
		for _, a := range architectures {
			names = append(names, a.name)
		}
		return Shape{}, &UnsupportedError{"general.architecture", fmt.Sprintf("%q is not trainable, only %s are", name, strings.Join(names, ", "))}
	}
	a := architectures[index]
	key := func(suffix string) string { return a.name + "." + suffix }
	var missing []string
	integer := func(suffix string) int {
		v, ok := f.Metadata.Int(key(suffix))
		if !ok || v <= 0 || v > math.MaxInt32 {
			missing = append(missing, key(suffix))
			return 1
		}
		return int(v)
	}
	optional := func(suffix string, fallback int) int {
		if v, ok := f.Metadata.Int(key(suffix)); ok && v > 0 && v <= math.MaxInt32 {
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
		architecture:  a,
	}
	epsilon, ok := f.Metadata.Float(key("attention.layer_norm_rms_epsilon"))
	if !ok {
		missing = append(missing, key("attention.layer_norm_rms_epsilon"))
	}
	if len(missing) > 0 {
		return Shape{}, &UnsupportedError{"metadata", "missing or not a positive number: " + strings.Join(missing, ", ")}
	}
	s.Epsilon = float32(epsilon)
	s.Heads.KeyValue = optional("attention.head_count_kv", s.Heads.Query)
	s.Heads.Size = optional("attention.key_length", s.Embedding/s.Heads.Query)
	s.RopeDimensions = optional("rope.dimension_count", s.Heads.Size)
	if base, ok := f.Metadata.Float(key("rope.freq_base")); ok {
		s.RopeBase = float32(base)
	}
	switch kind, _ := f.Metadata.String(key("rope.scaling.type")); kind {
	case "", "none":
	case "linear":
		factor, ok := f.Metadata.Float(key("rope.scaling.factor"))
		if !ok || factor <= 0 {
			return Shape{}, &UnsupportedError{key("rope.scaling.factor"), "missing or not positive"}
		}
		s.RopeScale = float32(1 / factor)
	default:
		return Shape{}, &UnsupportedError{key("rope.scaling.type"), fmt.Sprintf("%q is not trainable, only linear scaling is", kind)}
	}
	if embedding, ok := f.Tensor("token_embd.weight"); ok && len(embedding.Shape) == 2 {
		s.Vocabulary = int(embedding.Shape[1])
	}
	_, untied := f.Tensor("output.weight")
	s.TiedHead = !untied
	switch {
	case s.Vocabulary == 0:
		return Shape{}, &UnsupportedError{"token_embd.weight", "missing"}
	case s.Heads.Query%s.Heads.KeyValue != 0:
		return Shape{}, &UnsupportedError{key("attention.head_count_kv"), fmt.Sprintf("%d does not divide %d query heads", s.Heads.KeyValue, s.Heads.Query)}
	case s.Embedding%16 != 0 || s.FeedForward%16 != 0 || s.Heads.Size%16 != 0:
		return Shape{}, &UnsupportedError{"metadata", fmt.Sprintf("embedding %d, feed-forward %d and head size %d must be multiples of 16", s.Embedding, s.FeedForward, s.Heads.Size)}
	case s.RopeDimensions > s.Heads.Size || s.RopeDimensions%2 != 0:
		return Shape{}, &UnsupportedError{key("rope.dimension_count"), fmt.Sprintf("%d does not fit a head of %d", s.RopeDimensions, s.Heads.Size)}
	}
	if n, ok := f.Metadata.Int(key("expert_count")); ok && n > 0 {
		return Shape{}, &UnsupportedError{key("expert_count"), "mixtures of experts are not trainable"}
	}
	if n := optional("attention.value_length", s.Heads.Size); n != s.Heads.Size {
		return Shape{}, &UnsupportedError{key("attention.value_length"), fmt.Sprintf("%d differs from the key length of %d", n, s.Heads.Size)}
	}
	for _, t := range f.Tensors {
		if len(t.Shape) == 2 && !slices.Contains(weightTypes, t.Type) {
			return Shape{}, &UnsupportedError{t.Name, fmt.Sprintf("type %s is not trainable, only %v are", t.Type, weightTypes)}
		}
		suffix := t.Name
		if _, after, ok := strings.Cut(strings.TrimPrefix(t.Name, "blk."), "."); ok && strings.HasPrefix(t.Name, "blk.") {
			suffix = after
		}
		if !a.extra(suffix) {
			return Shape{}, &UnsupportedError{t.Name, fmt.Sprintf("models of architecture %q with this tensor are not trainable", a.name)}
		}
	}
	return s, nil
}
