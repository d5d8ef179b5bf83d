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
	factors  bool   // the frequencies of the rotary embedding may have divisors of their own, rope_freqs.weight (Llama 3)
}

var architectures = []*architecture{&llama, &qwen2, &qwen3}

// reads says whether the architecture reads a tensor, by its name without "blk.N.". A tensor that it does not read would
// change what the model computes elsewhere.
func (a *architecture) reads(block bool, name string) bool {
	if !block {
		return name == "rope_freqs.weight" && a.factors || slices.Contains([]string{"token_embd.weight", "output_norm.weight", "output.weight"}, name)
	}
	switch name {
	case "attn_norm.weight", "ffn_norm.weight":
		return true
	case "attn_q.bias", "attn_k.bias", "attn_v.bias":
		return a.bias
	case "attn_q_norm.weight", "attn_k_norm.weight":
		return a.headNorm
	}
	tensor, ok := strings.CutSuffix(name, ".weight")
	return ok && slices.ContainsFunc(AllLinear, func(m Module) bool { return m.TensorName() == tensor })
}

// Shape is what a model's metadata says.
type Shape struct {
	Layers, Embedding, FeedForward int
	Heads                          ggml.Heads
	Vocabulary                     int
	ContextTokens                  int // trained context, at most the window of sliding-window attention: shorter rows see all before
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
		architecture:  a,
	}
	var err error
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
	if window := optional("attention.sliding_window", s.ContextTokens); window < s.ContextTokens {
		s.ContextTokens = window
	}
	if s.RopeScale, err = ropeScale(f, key); err != nil {
		return Shape{}, err
	}
	if embedding, ok := f.Tensor("token_embd.weight"); ok && len(embedding.Shape) == 2 {
		s.Vocabulary = int(embedding.Shape[1])
	}
	_, untied := f.Tensor("output.weight")
	s.TiedHead = !untied
	switch {
	case s.Vocabulary == 0:
		return Shape{}, &UnsupportedError{"token_embd.weight", "missing"}
	case s.Layers > len(f.Tensors):
		return Shape{}, &UnsupportedError{key("block_count"), fmt.Sprintf("%d, but the file has %d tensors", s.Layers, len(f.Tensors))}
	case s.Heads.Query%s.Heads.KeyValue != 0:
		return Shape{}, &UnsupportedError{key("attention.head_count_kv"), fmt.Sprintf("%d does not divide %d query heads", s.Heads.KeyValue, s.Heads.Query)}
	case s.Embedding%16 != 0 || s.FeedForward%16 != 0 || s.Heads.Size%16 != 0:
		return Shape{}, &UnsupportedError{"metadata", fmt.Sprintf("embedding %d, feed-forward %d and head size %d must be multiples of 16", s.Embedding, s.FeedForward, s.Heads.Size)}
	case s.RopeDimensions > s.Heads.Size || s.RopeDimensions%2 != 0:
		return Shape{}, &UnsupportedError{key("rope.dimension_count"), fmt.Sprintf("%d does not fit a head of %d", s.RopeDimensions, s.Heads.Size)}
	}
	if err := a.refuse(f, key); err != nil {
		return Shape{}, err
	}
	if n := optional("attention.value_length", s.Heads.Size); n != s.Heads.Size {
		return Shape{}, &UnsupportedError{key("attention.value_length"), fmt.Sprintf("%d differs from the key length of %d", n, s.Heads.Size)}
	}
	return s, nil
}

// Trainable returns an *UnsupportedError if the model in the GGUF file at path cannot be trained. It reads the header alone.
func Trainable(path string) error {
	f, err := gguf.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = ReadShape(f)
	return err
}

// ropeScale is the factor of the positions, as llama.cpp reads it: the scaling is linear where its type is not given.
func ropeScale(f *gguf.File, key func(string) string) (float32, error) {
	if factor, ok := f.Metadata.Float(key("rope.scaling.attn_factor")); ok && factor != 1 {
		return 0, &UnsupportedError{key("rope.scaling.attn_factor"), fmt.Sprintf("%g is not trainable, only 1 is", factor)}
	}
	switch kind, given := f.Metadata.String(key("rope.scaling.type")); {
	case kind == "none":
		return 1, nil
	case given && kind != "linear":
		return 0, &UnsupportedError{key("rope.scaling.type"), fmt.Sprintf("%q is not trainable, only linear scaling and the factors of rope_freqs.weight are", kind)}
	}
	for _, name := range []string{"rope.scaling.factor", "rope.scale_linear"} {
		factor, ok := f.Metadata.Float(key(name))
		switch {
		case !ok || factor == 0: // llama.cpp takes 0 for no scaling
		case factor < 0 || math.IsNaN(factor) || math.IsInf(factor, 0):
			return 0, &UnsupportedError{key(name), fmt.Sprintf("%g is no factor", factor)}
		default:
			return float32(1 / factor), nil
		}
	}
	return 1, nil
}

// refuse names what the graph would compute otherwise than the model.
func (a *architecture) refuse(f *gguf.File, key func(string) string) error {
	if n, ok := f.Metadata.Int(key("expert_count")); ok && n > 0 {
		return &UnsupportedError{key("expert_count"), "mixtures of experts are not trainable"}
	}
	if _, ok := f.Metadata[key("rope.dimension_sections")]; ok {
		return &UnsupportedError{key("rope.dimension_sections"), "rotary embedding in sections is not trainable"}
	}
	if causal, ok := f.Metadata.Bool(key("attention.causal")); ok && !causal {
		return &UnsupportedError{key("attention.causal"), "only causal attention is trainable"}
	}
	for _, t := range f.Tensors {
		if len(t.Shape) == 2 && !slices.Contains(weightTypes, t.Type) {
			return &UnsupportedError{t.Name, fmt.Sprintf("type %s is not trainable, only %v are", t.Type, weightTypes)}
		}
		name, block := strings.CutPrefix(t.Name, "blk.")
		if block {
			_, name, _ = strings.Cut(name, ".")
		}
		if !a.reads(block, name) {
			return &UnsupportedError{t.Name, fmt.Sprintf("models of architecture %q with this tensor are not trainable", a.name)}
		}
	}
	return nil
}
