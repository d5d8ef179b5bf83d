package graph_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
)

// header is a small model of an architecture: one layer, width 32, 2 heads and 1 key-value head of 16, 4 tokens.
type header struct {
	metadata map[string]any
	shapes   map[string][]int64
	types    map[string]gguf.Type // F32 if not given
}

func newHeader(architecture string) header {
	key := func(suffix string) string { return architecture + "." + suffix }
	h := header{
		metadata: map[string]any{
			"general.architecture": architecture, key("block_count"): uint32(1), key("embedding_length"): uint32(32),
			key("feed_forward_length"): uint32(48), key("context_length"): uint32(512), key("attention.head_count"): uint32(2),
			key("attention.head_count_kv"): uint32(1), key("attention.layer_norm_rms_epsilon"): float32(1e-5),
		},
		shapes: map[string][]int64{
			"token_embd.weight": {32, 4}, "output_norm.weight": {32}, "blk.0.attn_norm.weight": {32}, "blk.0.ffn_norm.weight": {32},
			"blk.0.attn_q.weight": {32, 32}, "blk.0.attn_k.weight": {32, 16}, "blk.0.attn_v.weight": {32, 16}, "blk.0.attn_output.weight": {32, 32},
			"blk.0.ffn_gate.weight": {32, 48}, "blk.0.ffn_up.weight": {32, 48}, "blk.0.ffn_down.weight": {48, 32},
		},
		types: map[string]gguf.Type{},
	}
	switch architecture {
	case "qwen2":
		h.shapes["blk.0.attn_q.bias"], h.shapes["blk.0.attn_k.bias"], h.shapes["blk.0.attn_v.bias"] = []int64{32}, []int64{16}, []int64{16}
	case "qwen3":
		h.shapes["blk.0.attn_q_norm.weight"], h.shapes["blk.0.attn_k_norm.weight"] = []int64{16}, []int64{16}
	}
	return h
}

func (h header) open(t *testing.T) *gguf.File {
	t.Helper()
	f, err := gguf.Open(h.write(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// write returns the path of a file with the header, and zeros for weights.
func (h header) write(t *testing.T) string {
	t.Helper()
	var metadata []gguf.KeyValue
	for _, key := range slices.Sorted(maps.Keys(h.metadata)) {
		metadata = append(metadata, gguf.KeyValue{Key: key, Value: h.metadata[key]})
	}
	var tensors []gguf.TensorData
	for _, name := range slices.Sorted(maps.Keys(h.shapes)) {
		elements := int64(1)
		for _, n := range h.shapes[name] {
			elements *= n
		}
		kind := h.types[name]
		tensors = append(tensors, gguf.TensorData{Name: name, Shape: h.shapes[name], Type: kind, Data: make([]byte, elements/kind.BlockSize()*kind.TypeBytes())})
	}
	path := filepath.Join(t.TempDir(), "model.gguf")
	if err := gguf.WriteFile(path, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	return path
}

// loadError is what Load says of the header.
func (h header) loadError(t *testing.T) error {
	t.Helper()
	backend, err := ggml.NewCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	model, err := graph.Load(h.open(t), backend, graph.ExactLayout())
	model.Close()
	return err
}

func TestReadShape(t *testing.T) {
	base := graph.Shape{
		Layers: 1, Embedding: 32, FeedForward: 48, Heads: ggml.Heads{Size: 16, Query: 2, KeyValue: 1}, Vocabulary: 4, ContextTokens: 512,
		Epsilon: 1e-5, RopeBase: 10000, RopeScale: 1, RopeDimensions: 16, TiedHead: true,
	}
	for _, test := range []struct {
		name, architecture string
		set                map[string]any // "" architecture prefix is added
		want               func(*graph.Shape)
	}{
		{"defaults", "llama", nil, func(*graph.Shape) {}},
		{"defaults", "qwen2", nil, func(*graph.Shape) {}},
		{"defaults", "qwen3", nil, func(*graph.Shape) {}},
		{"base", "qwen2", map[string]any{"rope.freq_base": float32(1e6)}, func(s *graph.Shape) { s.RopeBase = 1e6 }},
		{"linear", "llama", map[string]any{"rope.scaling.type": "linear", "rope.scaling.factor": float32(4)}, func(s *graph.Shape) { s.RopeScale = 0.25 }},
		// llama.cpp scales linearly unless the type says otherwise.
		{"untyped", "llama", map[string]any{"rope.scaling.factor": float32(2)}, func(s *graph.Shape) { s.RopeScale = 0.5 }},
		{"old key", "llama", map[string]any{"rope.scale_linear": float32(2)}, func(s *graph.Shape) { s.RopeScale = 0.5 }},
		{"none", "llama", map[string]any{"rope.scaling.type": "none", "rope.scaling.factor": float32(2)}, func(*graph.Shape) {}},
		{"factor 0", "llama", map[string]any{"rope.scaling.factor": float32(0)}, func(*graph.Shape) {}},
		{"window", "llama", map[string]any{"attention.sliding_window": uint32(256)}, func(s *graph.Shape) { s.ContextTokens = 256 }},
		{"wide window", "llama", map[string]any{"attention.sliding_window": uint32(4096)}, func(*graph.Shape) {}},
		{"partial rotation", "qwen3", map[string]any{"rope.dimension_count": uint32(8)}, func(s *graph.Shape) { s.RopeDimensions = 8 }},
	} {
		t.Run(test.architecture+"/"+test.name, func(t *testing.T) {
			h := newHeader(test.architecture)
			for key, value := range test.set {
				h.metadata[test.architecture+"."+key] = value
			}
			got, err := graph.ReadShape(h.open(t))
			if err != nil {
				t.Fatal(err)
			}
			want := base
			test.want(&want)
			if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(graph.Shape{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if err := h.loadError(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestHeadSize reads heads whose size is not width/heads (Mistral Nemo), and a head of its own matrix.
func TestHeadSize(t *testing.T) {
	h := newHeader("llama")
	h.metadata["llama.attention.key_length"], h.metadata["llama.attention.value_length"] = uint32(32), uint32(32)
	h.shapes["blk.0.attn_q.weight"], h.shapes["blk.0.attn_output.weight"] = []int64{32, 64}, []int64{64, 32}
	h.shapes["blk.0.attn_k.weight"], h.shapes["blk.0.attn_v.weight"] = []int64{32, 32}, []int64{32, 32}
	h.shapes["output.weight"], h.shapes["rope_freqs.weight"] = []int64{32, 4}, []int64{16}
	s, err := graph.ReadShape(h.open(t))
	if err != nil {
		t.Fatal(err)
	}
	if s.Heads.Size != 32 || s.RopeDimensions != 32 || s.TiedHead || s.Parameters() != 2*32*64+2*32*32+3*32*48 {
		t.Errorf("%+v, %d parameters", s, s.Parameters())
	}
	if err := h.loadError(t); err != nil {
		t.Error(err)
	}
}

// TestWeightTypes takes every type that can be trained on.
func TestWeightTypes(t *testing.T) {
	for _, kind := range []gguf.Type{gguf.F16, gguf.BF16, gguf.Q8_0, gguf.Q6K, gguf.Q5K, gguf.Q5_0, gguf.Q5_1, gguf.Q4K, gguf.Q4_0, gguf.Q4_1, gguf.IQ4NL} {
		h := newHeader("llama")
		h.metadata["llama.feed_forward_length"] = uint32(256)
		h.shapes["blk.0.ffn_gate.weight"], h.shapes["blk.0.ffn_up.weight"], h.shapes["blk.0.ffn_down.weight"] = []int64{32, 256}, []int64{32, 256}, []int64{256, 32}
		h.types["blk.0.ffn_down.weight"] = kind
		if err := h.loadError(t); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, test := range []struct {
		name, architecture string
		change             func(header)
		want               string // named by the error
	}{
		{"other architecture", "gemma3", func(header) {}, `general.architecture: "gemma3" is not trainable, only llama, qwen2, qwen3`},
		{"no architecture", "llama", func(h header) { delete(h.metadata, "general.architecture") }, "general.architecture"},
		{"no epsilon", "llama", func(h header) { delete(h.metadata, "llama.attention.layer_norm_rms_epsilon") }, "llama.attention.layer_norm_rms_epsilon"},
		{"heads per layer", "llama", func(h header) { h.metadata["llama.attention.head_count"] = []int32{2} }, "llama.attention.head_count"},
		{"many layers", "llama", func(h header) { h.metadata["llama.block_count"] = uint32(1 << 30) }, "llama.block_count"},
		{"yarn", "qwen2", func(h header) { h.metadata["qwen2.rope.scaling.type"] = "yarn" }, `qwen2.rope.scaling.type: "yarn"`},
		{"longrope", "llama", func(h header) { h.metadata["llama.rope.scaling.type"] = "longrope" }, "llama.rope.scaling.type"},
		{"negative factor", "llama", func(h header) { h.metadata["llama.rope.scaling.factor"] = float32(-1) }, "llama.rope.scaling.factor"},
		{"NaN factor", "llama", func(h header) { h.metadata["llama.rope.scaling.factor"] = float32(math.NaN()) }, "llama.rope.scaling.factor"},
		{"attention factor", "llama", func(h header) { h.metadata["llama.rope.scaling.attn_factor"] = float32(1.2) }, "llama.rope.scaling.attn_factor"},
		{"sections", "qwen2", func(h header) { h.metadata["qwen2.rope.dimension_sections"] = []int32{16, 24, 24, 0} }, "qwen2.rope.dimension_sections"},
		{"experts", "llama", func(h header) { h.metadata["llama.expert_count"] = uint32(8) }, "llama.expert_count"},
		{"expert tensors", "qwen3", func(h header) { h.shapes["blk.0.ffn_gate_exps.weight"] = []int64{32, 48, 4} }, "blk.0.ffn_gate_exps.weight"},
		{"not causal", "qwen3", func(h header) { h.metadata["qwen3.attention.causal"] = false }, "qwen3.attention.causal"},
		{"bias of q", "llama", func(h header) { h.shapes["blk.0.attn_q.bias"] = []int64{32} }, `blk.0.attn_q.bias: models of architecture "llama"`},
		{"bias of o", "qwen2", func(h header) { h.shapes["blk.0.attn_output.bias"] = []int64{32} }, "blk.0.attn_output.bias"},
		{"bias of q", "qwen3", func(h header) { h.shapes["blk.0.attn_q.bias"] = []int64{32} }, "blk.0.attn_q.bias"},
		{"bias of the head", "qwen2", func(h header) { h.shapes["output.bias"] = []int64{4} }, "output.bias"},
		{"classifier", "qwen3", func(h header) { h.shapes["cls.output.weight"] = []int64{32, 2} }, "cls.output.weight"},
		{"head norms", "llama", func(h header) { h.shapes["blk.0.attn_q_norm.weight"] = []int64{16} }, "blk.0.attn_q_norm.weight"},
		{"head norms", "qwen2", func(h header) { h.shapes["blk.0.attn_k_norm.weight"] = []int64{16} }, "blk.0.attn_k_norm.weight"},
		{"rope factors", "qwen2", func(h header) { h.shapes["rope_freqs.weight"] = []int64{8} }, "rope_freqs.weight"},
		{"few rope factors", "llama", func(h header) { h.shapes["rope_freqs.weight"] = []int64{4} }, "rope_freqs.weight"},
		{"no bias", "qwen2", func(h header) { delete(h.shapes, "blk.0.attn_k.bias") }, "blk.0.attn_k.bias"},
		{"no head norm", "qwen3", func(h header) { delete(h.shapes, "blk.0.attn_q_norm.weight") }, "blk.0.attn_q_norm.weight"},
		{"no weight", "llama", func(h header) { delete(h.shapes, "blk.0.ffn_up.weight") }, "blk.0.ffn_up.weight"},
		{"no embedding", "llama", func(h header) { delete(h.shapes, "token_embd.weight") }, "token_embd.weight"},
		{"shape", "llama", func(h header) { h.shapes["blk.0.attn_k.weight"] = []int64{32, 32} }, "blk.0.attn_k.weight: expected a matrix of 32 x 16"},
		{"values of other size", "llama", func(h header) { h.metadata["llama.attention.value_length"] = uint32(32) }, "llama.attention.value_length"},
		{"odd heads", "llama", func(h header) { h.metadata["llama.attention.head_count"] = uint32(3) }, "multiples of 16"},
		{"rotation", "llama", func(h header) { h.metadata["llama.rope.dimension_count"] = uint32(18) }, "llama.rope.dimension_count"},
		{"norm type", "llama", func(h header) { h.types["output_norm.weight"] = gguf.F16 }, "output_norm.weight"},
		{"weight type", "llama", func(h header) {
			h.shapes["output.weight"], h.types["output.weight"] = []int64{256, 4}, gguf.Q3K
		}, "output.weight: type " + gguf.Q3K.String()},
	} {
		t.Run(fmt.Sprintf("%s/%s", test.architecture, test.name), func(t *testing.T) {
			h := newHeader(test.architecture)
			test.change(h)
			err := h.loadError(t)
			var unsupported *graph.UnsupportedError
			if !errors.As(err, &unsupported) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an *UnsupportedError with %q", err, test.want)
			}
		})
	}
}

// TestTrainable asks of every type of weights whether it can be trained on.
func TestTrainable(t *testing.T) {
	trainable := []gguf.Type{
		gguf.F32, gguf.F16, gguf.BF16, gguf.Q8_0, gguf.Q6K, gguf.Q5K, gguf.Q5_0, gguf.Q5_1, gguf.Q4K, gguf.Q4_0, gguf.Q4_1, gguf.IQ4NL,
	}
	asked := 0
	for kind := gguf.F32; kind <= gguf.MXFP4; kind++ {
		if kind.BlockSize() == 0 { // there is no such type
			continue
		}
		asked++
		h := newHeader("llama")
		h.shapes["output.weight"], h.types["output.weight"] = []int64{256, 4}, kind
		err := graph.Trainable(h.write(t))
		if slices.Contains(trainable, kind) {
			if err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			continue
		}
		if unsupported := new(graph.UnsupportedError); !errors.As(err, &unsupported) || !strings.Contains(err.Error(), "output.weight: type "+kind.String()+" is not trainable") {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if asked < 2*len(trainable) {
		t.Errorf("%d types were asked for", asked)
	}
	if err := graph.Trainable(newHeader("gpt2").write(t)); err == nil || !strings.Contains(err.Error(), `"gpt2" is not trainable, only llama`) {
		t.Errorf("another architecture: %v", err)
	}
	if err := graph.Trainable(filepath.Join(t.TempDir(), "none.gguf")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
