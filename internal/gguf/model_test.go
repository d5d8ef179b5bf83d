package gguf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/modeltest"
)

// tiny is a llama of 2 layers, 4 heads (2 of k and v) of size 2, and 300 tokens.
const tinyLayers, tinyEmbd, tinyKV, tinyFF, tinyVocab = 2, 8, 4, 16, 300

func tinyMetadata() []KeyValue {
	var tokens []string
	types := make([]int32, tinyVocab)
	scores := make([]float32, tinyVocab)
	for b := range 256 {
		tokens = append(tokens, fmt.Sprintf("<0x%02X>", b))
	}
	for i := len(tokens); i < tinyVocab; i++ {
		tokens = append(tokens, fmt.Sprintf("word%d", i))
	}
	return []KeyValue{
		{"general.architecture", "llama"},
		{"general.type", "model"},
		{"llama.block_count", uint32(tinyLayers)},
		{"llama.context_length", uint32(128)},
		{"llama.embedding_length", uint32(tinyEmbd)},
		{"llama.feed_forward_length", uint32(tinyFF)},
		{"llama.attention.head_count", uint32(4)},
		{"llama.attention.head_count_kv", uint32(2)},
		{"llama.attention.layer_norm_rms_epsilon", float32(1e-5)},
		{"llama.rope.freq_base", float32(10000)},
		{"tokenizer.ggml.model", "llama"},
		{"tokenizer.ggml.tokens", tokens},
		{"tokenizer.ggml.scores", scores},
		{"tokenizer.ggml.token_type", types},
		{"tokenizer.ggml.bos_token_id", uint32(1)},
		{"tokenizer.ggml.eos_token_id", uint32(2)},
		{"tokenizer.chat_template", "{{ messages }}"},
	}
}

func tinyTensors() []TensorData {
	var out []TensorData
	add := func(name string, shape ...int64) {
		n := int64(1)
		for _, d := range shape {
			n *= d
		}
		out = append(out, TensorData{name, shape, F32, make([]byte, 4*n), nil})
	}
	add("token_embd.weight", tinyEmbd, tinyVocab)
	for i := range tinyLayers {
		blk := fmt.Sprintf("blk.%d.", i)
		add(blk+"attn_norm.weight", tinyEmbd)
		add(blk+"attn_q.weight", tinyEmbd, tinyEmbd)
		add(blk+"attn_k.weight", tinyEmbd, tinyKV)
		add(blk+"attn_v.weight", tinyEmbd, tinyKV)
		add(blk+"attn_output.weight", tinyEmbd, tinyEmbd)
		add(blk+"ffn_norm.weight", tinyEmbd)
		add(blk+"ffn_gate.weight", tinyEmbd, tinyFF)
		add(blk+"ffn_up.weight", tinyEmbd, tinyFF)
		add(blk+"ffn_down.weight", tinyFF, tinyEmbd)
	}
	add("output_norm.weight", tinyEmbd)
	return out
}

// set replaces a key's value; nil removes the key, and a new key goes to the end.
func set(metadata []KeyValue, key string, value any) []KeyValue {
	var out []KeyValue
	for _, kv := range metadata {
		if kv.Key != key {
			out = append(out, kv)
		}
	}
	if value != nil {
		out = append(out, KeyValue{key, value})
	}
	return out
}

func writeTiny(t *testing.T, metadata []KeyValue, tensors []TensorData) *File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tiny.gguf")
	if err := WriteFile(path, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestCheckModel(t *testing.T) {
	t.Parallel()
	if err := CheckModel(writeTiny(t, tinyMetadata(), tinyTensors())); err != nil {
		t.Fatal(err)
	}
	// One number for each layer is as good as one for all.
	perLayer := set(tinyMetadata(), "llama.attention.head_count", []int32{4, 4})
	if err := CheckModel(writeTiny(t, perLayer, tinyTensors())); err != nil {
		t.Fatal(err)
	}
	// Other architectures: the engine judges the tensors.
	other := set(tinyMetadata(), "general.architecture", "gemma")
	for _, k := range []string{"block_count", "context_length", "embedding_length"} {
		other = set(other, "gemma."+k, uint32(8))
	}
	if err := CheckModel(writeTiny(t, other, tinyTensors())); err != nil {
		t.Fatal(err)
	}
}

func TestCheckModelRefuses(t *testing.T) {
	t.Parallel()
	tokens := func(change func([]string)) []string {
		for _, kv := range tinyMetadata() {
			if kv.Key == "tokenizer.ggml.tokens" {
				words := kv.Value.([]string)
				change(words)
				return words
			}
		}
		panic("the tiny model has no tokens")
	}
	for _, tt := range []struct {
		key   string
		value any
		want  string
	}{
		{"general.architecture", nil, "is missing"},
		{"general.architecture", "clip", "llama, "},
		{"general.architecture", uint32(1), "no string"},
		{"general.type", "adapter", "no base model"},
		{"general.alignment", uint32(8), "at least 32"},
		{"split.count", uint16(3), "split model"},
		{"llama.block_count", nil, "is missing"},
		{"llama.block_count", uint32(0), "is 0"},
		{"llama.block_count", uint32(513), "1 to 512"},
		{"llama.block_count", uint32(3), `"blk.2.attn_norm.weight": is missing`},
		{"llama.block_count", int64(2), "expected uint32"},
		{"llama.block_count", []uint32{}, "expected uint32"},
		{"llama.embedding_length", uint32(0), "is 0"},
		{"llama.context_length", uint32(0), "is 0"},
		{"llama.feed_forward_length", nil, "is missing"},
		{"llama.feed_forward_length", uint32(32), "has shape"},
		{"llama.attention.head_count", nil, "is missing"},
		{"llama.attention.head_count", uint32(0), "is 0"},
		{"llama.attention.head_count", []int32{4}, "each of the 2 layers"},
		{"llama.attention.head_count", []float32{4, 4}, "expected uint32"},
		{"llama.attention.head_count", []int32{4, -4}, "is -4"},
		{"llama.attention.head_count_kv", uint32(3), "divisor"},
		{"llama.attention.head_count_kv", uint32(8), "divisor"},
		{"llama.attention.key_length", uint32(3), "even"},
		{"llama.attention.value_length", uint32(4), "head size"},
		{"llama.rope.dimension_count", uint32(4), "head size"},
		{"llama.rope.freq_base", float32(0), "positive"},
		{"llama.rope.scaling.type", "spiral", "expected none, linear"},
		{"llama.attention.layer_norm_rms_epsilon", nil, "is missing"},
		{"llama.attention.layer_norm_rms_epsilon", float32(-1), "positive"},
		{"llama.expert_count", uint32(600), "0 to 512"},
		{"llama.expert_count", uint32(4), "expert_used_count"},
		{"llama.expert_used_count", uint32(4), "expert_used_count"},
		{"tokenizer.ggml.model", nil, "no vocabulary"},
		{"tokenizer.ggml.model", "sorcery", "expected llama"},
		{"tokenizer.ggml.model", "gpt2", `merges": is missing`},
		{"tokenizer.ggml.tokens", nil, "is missing"},
		{"tokenizer.ggml.tokens", uint32(1), "array of string"},
		{"tokenizer.ggml.tokens", []string{}, "at least 1"},
		{"tokenizer.ggml.tokens", []string{"a"}, "300 elements, expected 1"},
		{"tokenizer.ggml.tokens", tokens(func(w []string) { w[299] = w[298] }), "twice"},
		{"tokenizer.ggml.tokens", tokens(func(w []string) { w[299] = w[298] + "\x00x" }), "twice"},
		{"tokenizer.ggml.tokens", tokens(func(w []string) { w[299], w[298] = "[EMPTY_298]", "" }), "twice"},
		{"tokenizer.ggml.tokens", tokens(func(w []string) { w[10] = "newline" }), "byte <0x0A>"},
		{"tokenizer.ggml.scores", []float32{1}, "has 1 elements"},
		{"tokenizer.ggml.scores", make([]uint8, tinyVocab), "array of float32"},
		{"tokenizer.ggml.token_type", make([]uint8, tinyVocab), "array of int32"},
		{"tokenizer.ggml.token_type", make([]int32, tinyVocab-1), "has 299 elements"},
		{"tokenizer.ggml.bos_token_id", uint32(tinyVocab), "not in the vocabulary"},
		{"tokenizer.ggml.eos_token_id", "2", "expected uint32"},
		{"tokenizer.ggml.eos_token_id", []uint32{}, "expected uint32"},
		{"tokenizer.chat_template", uint32(1), "expected string"},
	} {
		t.Run(fmt.Sprintf("%s=%.20v", tt.key, tt.value), func(t *testing.T) {
			t.Parallel()
			err := CheckModel(writeTiny(t, set(tinyMetadata(), tt.key, tt.value), tinyTensors()))
			if !errors.As(err, new(*FormatError)) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want *FormatError with %q", err, tt.want)
			}
		})
	}

	for name, change := range map[string]func(*TensorData){
		"token_embd.weight":        func(d *TensorData) { d.Shape = []int64{8, 299}; d.Data = d.Data[:4*8*299] },
		"blk.1.attn_k.weight":      func(d *TensorData) { d.Shape = []int64{4, 8} },
		"blk.0.attn_norm.weight":   func(d *TensorData) { d.Type, d.Data = F16, d.Data[:16] },
		"blk.0.attn_output.weight": func(d *TensorData) { d.Type = I32 },
		"blk.1.ffn_down.weight":    func(d *TensorData) { d.Name = "blk.1.ffn_dawn.weight" },
		"output_norm.weight":       func(d *TensorData) { d.Shape = []int64{4, 2} },
	} {
		tensors := tinyTensors()
		for i := range tensors {
			if tensors[i].Name == name {
				change(&tensors[i])
			}
		}
		err := CheckModel(writeTiny(t, tinyMetadata(), tensors))
		if !errors.As(err, new(*FormatError)) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s changed: error %v, want *FormatError that names it", name, err)
		}
	}
	if err := CheckModel(writeTiny(t, tinyMetadata(), nil)); err == nil {
		t.Error("CheckModel accepted a file without tensors")
	}
}

// TestDefaultModel checks the file that everything else runs with, and that each of its truncations is refused.
func TestDefaultModel(t *testing.T) {
	t.Parallel()
	path := modeltest.Path(t)
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := CheckModel(f); err != nil {
		t.Fatal(err)
	}
	if n, err := KeyValueElements(f); err != nil || n != 30*3*(64+64) {
		t.Errorf("a token's keys and values have %d elements, %v", n, err)
	}
	w, ok := f.Tensor("blk.29.ffn_down.weight")
	if !ok || w.Type != Q4_1 || w.Elements() != 1536*576 || int64(len(f.Data(w))) != w.Elements()/32*20 {
		t.Errorf("blk.29.ffn_down.weight is %+v, %v", w, ok)
	}
	handle, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	for size := int64(0); size < f.Size; size = size*3/2 + 1 {
		if _, err := Parse(handle, size); !errors.As(err, new(*FormatError)) {
			t.Errorf("cut to %d bytes: error %v, want *FormatError", size, err)
		}
	}
}

func TestCheckAdapter(t *testing.T) {
	t.Parallel()
	base := writeTiny(t, tinyMetadata(), tinyTensors())
	metadata := func() []KeyValue {
		return []KeyValue{{"general.type", "adapter"}, {"general.architecture", "llama"}, {"adapter.type", "lora"},
			{"adapter.lora.alpha", float32(4)}}
	}
	tensors := func() []TensorData {
		return []TensorData{
			{"blk.0.attn_k.weight.lora_a", []int64{8, 2}, F32, make([]byte, 64), nil},
			{"blk.0.attn_k.weight.lora_b", []int64{2, 4}, F32, make([]byte, 32), nil},
		}
	}
	if err := CheckAdapter(writeTiny(t, metadata(), tensors()), base); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(m *[]KeyValue, ts *[]TensorData)
		want   string
	}{
		{"a model", func(m *[]KeyValue, _ *[]TensorData) { *m = set(*m, "general.type", "model") }, "no LoRA"},
		{"type is a number", func(m *[]KeyValue, _ *[]TensorData) { *m = set(*m, "adapter.type", uint32(1)) }, "no LoRA"},
		{"other base", func(m *[]KeyValue, _ *[]TensorData) { *m = set(*m, "general.architecture", "qwen2") }, "the base model is"},
		{"alpha is an integer", func(m *[]KeyValue, _ *[]TensorData) { *m = set(*m, "adapter.lora.alpha", uint32(1)) }, "float32"},
		{"activated", func(m *[]KeyValue, _ *[]TensorData) {
			*m = set(*m, "adapter.alora.invocation_tokens", []uint32{1})
		}, "activated"},
		{"empty", func(_ *[]KeyValue, ts *[]TensorData) { *ts = nil }, "empty"},
		{"half a pair", func(_ *[]KeyValue, ts *[]TensorData) { *ts = (*ts)[:1] }, "other half"},
		{"suffix", func(_ *[]KeyValue, ts *[]TensorData) { (*ts)[0].Name = "blk.0.attn_k.weight.lora_c" }, "does not end in"},
		{"no such tensor", func(_ *[]KeyValue, ts *[]TensorData) {
			(*ts)[0].Name, (*ts)[1].Name = "blk.9.attn_k.weight.lora_a", "blk.9.attn_k.weight.lora_b"
		}, "does not have"},
		{"ranks differ", func(_ *[]KeyValue, ts *[]TensorData) {
			(*ts)[0].Shape, (*ts)[0].Data = []int64{8, 1}, make([]byte, 32)
		}, "ranks differ"},
		{"wrong size", func(_ *[]KeyValue, ts *[]TensorData) {
			(*ts)[1].Shape, (*ts)[1].Data = []int64{2, 8}, make([]byte, 64)
		}, "does not fit"},
		{"NaN", func(_ *[]KeyValue, ts *[]TensorData) { copy((*ts)[1].Data[4:], []byte{0, 0, 0xc0, 0x7f}) }, "not a number"},
		{"infinity", func(_ *[]KeyValue, ts *[]TensorData) { copy((*ts)[0].Data, []byte{0, 0, 0x80, 0xff}) }, "infinite"},
	} {
		m, ts := metadata(), tensors()
		tt.change(&m, &ts)
		err := CheckAdapter(writeTiny(t, m, ts), base)
		if !errors.As(err, new(*FormatError)) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want *FormatError with %q", tt.name, err, tt.want)
		}
	}
}
