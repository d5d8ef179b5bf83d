package gguf

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Limits of the engine (llama-hparams.h); beyond them it throws or writes out of bounds.
const (
	maxLayers  = 512
	maxExperts = 512
	// minModelAlignment is what ggml's CPU backend asserts of a mapped buffer.
	minModelAlignment = 32
)

// denseArchitectures are those whose tensors are checked one by one.
var denseArchitectures = []string{"llama", "qwen2", "qwen3"}

// architectures are the text generators that the engine knows (LLM_ARCH_NAMES of llama-arch.cpp, without those that
// only encode, see or speak).
var architectures = []string{"llama", "llama4", "deci", "falcon", "grok", "gpt2", "gptj", "gptneox", "mpt", "baichuan",
	"starcoder", "refact", "bloom", "stablelm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe",
	"qwen3next", "qwen3vl", "qwen3vlmoe", "phi2", "phi3", "phimoe", "plamo", "plamo2", "codeshell", "orion",
	"internlm2", "minicpm", "minicpm3", "gemma", "gemma2", "gemma3", "gemma3n", "starcoder2", "mamba", "mamba2",
	"jamba", "falcon-h1", "xverse", "command-r", "cohere2", "dbrx", "olmo", "olmo2", "olmoe", "openelm", "arctic",
	"deepseek", "deepseek2", "chatglm", "glm4", "glm4moe", "bitnet", "jais", "nemotron", "nemotron_h",
	"nemotron_h_moe", "exaone", "exaone4", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "granite", "granitemoe",
	"granitehybrid", "chameleon", "solar", "plm", "bailingmoe", "bailingmoe2", "dots1", "arcee", "afmoe",
	"ernie4_5", "ernie4_5-moe", "hunyuan-moe", "hunyuan-dense", "smollm3", "gpt-oss", "lfm2", "lfm2moe",
	"smallthinker", "seed_oss", "grovemoe", "apertus", "minimax-m2", "cogvlm", "pangu-embedded", "mistral3"}

// CheckModel checks that f is a base model that the engine can load: what its loader would answer with an assertion
// (which ends the process) or with an out-of-bounds read is a *FormatError here. For the architectures llama, qwen2
// and qwen3 without experts, every tensor's presence, shape and type are checked too; for others the engine is the
// judge of its own tensors.
func CheckModel(f *File) error {
	c := &checker{f: f}
	c.general()
	c.hyperParameters()
	c.tokenizer()
	c.tensors()
	return c.err
}

// checker holds a model's hyper-parameters while it is checked. As in decoder, the first error sticks.
type checker struct {
	f   *File
	err error

	arch    string
	layers  int64
	embd    int64
	context int64
	headDim int64   // of q and k
	valDim  int64   // of v
	heads   []int64 // per layer
	kvHeads []int64 // per layer
	ff      []int64 // per layer
	experts int64
	vocab   int64
}

func (c *checker) fail(what, format string, args ...any) {
	if c.err == nil {
		c.err = &FormatError{Path: c.f.Path, Offset: -1, What: what, Reason: fmt.Sprintf(format, args...)}
	}
}

func keyName(key string) string { return fmt.Sprintf("key %q", key) }

func (c *checker) general() {
	m := c.f.Metadata
	if kind, ok := m.String("general.type"); ok && kind != "model" {
		c.fail(keyName("general.type"), "is %q, expected \"model\": this file is no base model", kind)
	}
	arch, ok := m.String("general.architecture")
	switch {
	case !ok:
		c.fail(keyName("general.architecture"), "is missing or no string: the file does not say which model it is")
	case !slices.Contains(architectures, arch):
		c.fail(keyName("general.architecture"), "is %q, which the engine does not generate text with; it knows %s",
			arch, strings.Join(architectures, ", "))
	}
	c.arch = arch
	if parts, ok := m.Uint("split.count"); ok && parts > 1 {
		c.fail(keyName("split.count"), "is %d: this is one part of a split model; merge it first with llama-gguf-split --merge",
			parts)
	}
	if c.f.Alignment < minModelAlignment {
		c.fail(keyName(alignmentKey), "is %d, expected at least %d", c.f.Alignment, minModelAlignment)
	}
	if len(c.f.Tensors) == 0 {
		c.fail("header", "lists no tensors: the file holds no weights (is it a vocabulary only?)")
	}
}

// number reads an architecture's uint32 within [low, high]. A missing key gives missing; missing < 0 means required.
func (c *checker) number(suffix string, low, high, missing int64) int64 {
	if c.err != nil {
		return 0
	}
	key := c.arch + "." + suffix
	v, ok := c.f.Metadata[key]
	if !ok {
		if missing < 0 {
			c.fail(keyName(key), "is missing")
		}
		return missing
	}
	if v.Type != Uint32 {
		c.fail(keyName(key), "is of type %s, expected uint32", v.describe())
		return 0
	}
	n, _ := v.integer(0)
	if n < low || n > high {
		c.fail(keyName(key), "is %d, expected %d to %d", n, low, high)
	}
	return n
}

// perLayer reads a number, or an array with one number for each layer. A nil missing means required.
func (c *checker) perLayer(suffix string, low, high int64, missing []int64) []int64 {
	if c.err != nil {
		return nil
	}
	key := c.arch + "." + suffix
	v, ok := c.f.Metadata[key]
	switch {
	case !ok && missing == nil:
		c.fail(keyName(key), "is missing")
		return nil
	case !ok:
		return missing
	case v.Type != Array:
		return slices.Repeat([]int64{c.number(suffix, low, high, -1)}, int(c.layers))
	case v.Elem != Uint32 && v.Elem != Int32:
		c.fail(keyName(key), "is of type %s, expected uint32 or an array of them", v.describe())
		return nil
	case int64(v.Count) != c.layers:
		c.fail(keyName(key), "has %d elements, expected one for each of the %d layers", v.Count, c.layers)
		return nil
	}
	out, _ := c.f.Metadata.Ints(key)
	for i, n := range out {
		// Layers without attention or feed-forward have 0 in some architectures.
		if n < 0 || n > high {
			c.fail(keyName(key), "is %d for layer %d, expected 0 to %d", n, i, high)
		}
	}
	return out
}

func (c *checker) hyperParameters() {
	const wide = 1 << 24 // no model's dimension comes near; products of two fit
	c.layers = c.number("block_count", 1, maxLayers, -1)
	c.embd = c.number("embedding_length", 1, wide, -1)
	c.context = c.number("context_length", 1, math.MaxInt32, -1)
	if c.err != nil {
		return
	}
	none := make([]int64, c.layers)
	optional := none
	if c.dense() {
		optional = nil // required
	}
	c.ff = c.perLayer("feed_forward_length", 1, wide, optional)
	c.heads = c.perLayer("attention.head_count", 0, wide, optional)
	if c.err != nil {
		return
	}
	c.kvHeads = c.perLayer("attention.head_count_kv", 0, wide, c.heads)
	if c.err != nil {
		return
	}
	for i := range c.heads {
		h, kv := c.heads[i], c.kvHeads[i]
		if c.dense() && h < 1 {
			c.fail(keyName(c.arch+".attention.head_count"), "is %d for layer %d, expected 1 or more", h, i)
		}
		if kv > 0 && (kv > h || h%kv != 0) || c.dense() && kv < 1 {
			c.fail(keyName(c.arch+".attention.head_count_kv"),
				"is %d for layer %d, expected a divisor of the %d heads", kv, i, h)
		}
	}
	if c.heads[0] > 0 && c.err == nil {
		perHead := c.embd / c.heads[0]
		c.headDim = c.number("attention.key_length", 1, wide, perHead)
		c.valDim = c.number("attention.value_length", 1, wide, perHead)
		rot := c.number("rope.dimension_count", 0, wide, c.headDim)
		if c.dense() && c.err == nil {
			if c.headDim < 1 || c.headDim%2 != 0 {
				c.fail(keyName(c.arch+".attention.key_length"), "is %d, expected an even head size of 2 or more", c.headDim)
			}
			if c.valDim != c.headDim {
				c.fail(keyName(c.arch+".attention.value_length"), "is %d, expected the head size %d", c.valDim, c.headDim)
			}
			if rot%2 != 0 || rot > c.headDim || c.arch == "llama" && rot != c.headDim {
				c.fail(keyName(c.arch+".rope.dimension_count"), "is %d, which does not fit the head size %d", rot, c.headDim)
			}
		}
	}
	c.expertCounts()
	c.floats()
}

// expertCounts repeats the assertions of llama_model::load_hparams.
func (c *checker) expertCounts() {
	c.experts = c.number("expert_count", 0, maxExperts, 0)
	used := c.number("expert_used_count", 0, maxExperts, 0)
	groups := c.number("expert_group_count", 0, maxExperts, 0)
	usedGroups := c.number("expert_group_used_count", 0, maxExperts, 0)
	if c.err != nil {
		return
	}
	if c.experts == 0 && (used != 0 || groups != 0) || c.experts > 0 && (used < 1 || used > c.experts) {
		c.fail(keyName(c.arch+".expert_used_count"), "is %d, expected 1 to expert_count, which is %d", used, c.experts)
	}
	if c.experts > 0 && groups >= c.experts ||
		groups > 1 && (c.experts%groups != 0 || usedGroups < 1 || usedGroups >= groups) {
		c.fail(keyName(c.arch+".expert_group_count"), "is %d (%d used), which does not divide %d experts",
			groups, usedGroups, c.experts)
	}
}

// floats checks the constants that ggml asserts on or that would make every result NaN.
func (c *checker) floats() {
	if c.err != nil {
		return
	}
	m := c.f.Metadata
	positive := func(suffix string, zero, required bool) {
		key := c.arch + "." + suffix
		v, ok := m[key]
		if !ok {
			if required {
				c.fail(keyName(key), "is missing")
			}
			return
		}
		x, ok := m.Float(key)
		if v.Type != Float32 || !ok {
			c.fail(keyName(key), "is of type %s, expected float32", v.describe())
		} else if math.IsNaN(x) || math.IsInf(x, 0) || x < 0 || x == 0 && !zero {
			c.fail(keyName(key), "is %v, expected a positive number", x)
		}
	}
	positive("attention.layer_norm_rms_epsilon", true, c.dense())
	positive("attention.layer_norm_epsilon", true, false)
	positive("rope.freq_base", false, false)
	positive("rope.scaling.factor", true, false)
	key := c.arch + ".rope.scaling.type"
	if v, ok := m[key]; ok {
		s, _ := m.String(key)
		if !slices.Contains([]string{"none", "linear", "yarn", "longrope"}, s) {
			c.fail(keyName(key), "is %q (%s), expected none, linear, yarn or longrope", s, v.describe())
		}
	}
}

// dense says whether every tensor of the model is checked.
func (c *checker) dense() bool {
	experts, _ := c.f.Metadata.Uint(c.arch + ".expert_count")
	return slices.Contains(denseArchitectures, c.arch) && experts == 0
}

// specialTokens are the keys of token ids that the engine's vocabulary reads.
var specialTokens = []string{"bos", "eos", "eot", "eom", "unknown", "padding", "mask", "fim_pre", "fim_suf",
	"fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle",
	"seperator"} //nolint:misspell // llama.cpp spells the key so

// defaultTokens are the ids that the engine takes where a file does not name them.
var defaultTokens = map[string]map[string]int64{
	"llama":  {"bos": 1, "eos": 2, "unknown": 0},
	"gpt2":   {"bos": 11, "eos": 11},
	"t5":     {"eos": 1, "unknown": 2, "padding": 0},
	"plamo2": {"bos": 1, "eos": 2, "unknown": 0, "padding": 3},
}

func (c *checker) tokenizer() {
	if c.err != nil {
		return
	}
	m := c.f.Metadata
	const prefix = "tokenizer.ggml."
	model, ok := m.String(prefix + "model")
	if !ok {
		c.fail(keyName(prefix+"model"), "is missing: the file has no vocabulary")
		return
	}
	if _, known := defaultTokens[model]; !known && model != "rwkv" {
		c.fail(keyName(prefix+"model"), "is %q, expected llama, gpt2, t5, rwkv or plamo2", model)
		return
	}
	// The engine reads these arrays through pointers of the right type and the length of tokens.
	array := func(name string, required, sameLength bool, types ...ValueType) (Value, bool) {
		key := prefix + name
		v, ok := m[key]
		switch {
		case !ok && required:
			c.fail(keyName(key), "is missing")
		case !ok:
		case v.Type != Array || !slices.Contains(types, v.Elem):
			c.fail(keyName(key), "is of type %s, expected an array of %s", v.describe(), types[0])
		case sameLength && int64(v.Count) != c.vocab:
			c.fail(keyName(key), "has %d elements, expected %d, one for each of the tokens", v.Count, c.vocab)
		default:
			return v, true
		}
		return Value{}, false
	}
	tokens, ok := array("tokens", true, false, String)
	if !ok {
		return
	}
	c.vocab = int64(tokens.Count)
	if c.vocab < 1 || c.vocab > math.MaxInt32 {
		c.fail(keyName(prefix+"tokens"), "has %d elements, expected at least 1", c.vocab)
		return
	}
	array("scores", false, true, Float32)
	array("token_type", false, true, Int32, Uint32)
	array("merges", model == "gpt2", false, String)
	array("precompiled_charsmap", false, false, Uint8, Int8)
	c.tokenTexts(tokens, model)

	for _, name := range specialTokens {
		key := prefix + name + "_token_id"
		v, ok := m[key]
		if !ok {
			if id, has := defaultTokens[model][name]; has && id >= c.vocab {
				c.fail(keyName(key), "is missing, and its default %d is not in the vocabulary of %d tokens", id, c.vocab)
			}
			continue
		}
		if v.Type != Uint32 {
			c.fail(keyName(key), "is of type %s, expected uint32", v.describe())
			return
		}
		// The engine ignores other ids that are out of range, and real files have some (4294967295 for none).
		if id, _ := v.integer(0); id >= c.vocab && (name == "bos" || name == "eos") {
			c.fail(keyName(key), "is %d, which is not in the vocabulary of %d tokens", id, c.vocab)
		}
	}
	if v, ok := m["tokenizer.chat_template"]; ok && v.Type != String {
		c.fail(keyName("tokenizer.chat_template"), "is of type %s, expected string", v.describe())
	}
}

// tokenTexts checks that no two tokens have the same text, on which the engine asserts, and that a SentencePiece
// vocabulary can spell every byte: a missing one would be an exception in the middle of a request.
func (c *checker) tokenTexts(tokens Value, model string) {
	if c.err != nil {
		return
	}
	seen := make(map[string]int, tokens.Count)
	raw := tokens.raw
	for i := range tokens.Count {
		n := binary.LittleEndian.Uint64(raw)
		// The engine sees C strings, and names empty ones by their index.
		text, _, _ := strings.Cut(string(raw[8:8+n]), "\x00")
		raw = raw[8+n:]
		if text == "" {
			text = fmt.Sprintf("[EMPTY_%d]", i)
		}
		if j, dup := seen[text]; dup {
			c.fail(keyName("tokenizer.ggml.tokens"), "has the text %q twice, as tokens %d and %d", text, j, i)
			return
		}
		seen[text] = i
	}
	if model != "llama" {
		return
	}
	for b := range 256 {
		_, spelled := seen[fmt.Sprintf("<0x%02X>", b)]
		_, plain := seen[string([]byte{byte(b)})]
		if !spelled && !plain {
			c.fail(keyName("tokenizer.ggml.tokens"), "has no token for the byte <0x%02X>", b)
			return
		}
	}
}

func (c *checker) tensors() {
	if c.err != nil {
		return
	}
	embd, ok := c.f.Tensor("token_embd.weight")
	if !ok {
		c.fail(`tensor "token_embd.weight"`, "is missing")
		return
	}
	if len(embd.Shape) != 2 || embd.Shape[1] != c.vocab {
		c.fail(`tensor "token_embd.weight"`, "has shape %v, expected one row for each of the %d tokens", embd.Shape, c.vocab)
		return
	}
	if !c.dense() {
		return
	}
	c.matrix("token_embd.weight", c.embd, c.vocab, true)
	c.vector("output_norm.weight", c.embd, true)
	c.matrix("output.weight", c.embd, c.vocab, false)
	c.vector("output.bias", c.vocab, false)
	c.vector("rope_freqs.weight", c.headDim/2, false)
	for i := range c.layers {
		if c.err != nil {
			return
		}
		blk := fmt.Sprintf("blk.%d.", i)
		q, k, v := c.heads[i]*c.headDim, c.kvHeads[i]*c.headDim, c.kvHeads[i]*c.valDim
		c.vector(blk+"attn_norm.weight", c.embd, true)
		c.matrix(blk+"attn_q.weight", c.embd, q, true)
		c.matrix(blk+"attn_k.weight", c.embd, k, true)
		c.matrix(blk+"attn_v.weight", c.embd, v, true)
		c.matrix(blk+"attn_output.weight", q, c.embd, true)
		c.vector(blk+"attn_q.bias", q, false)
		c.vector(blk+"attn_k.bias", k, false)
		c.vector(blk+"attn_v.bias", v, false)
		c.vector(blk+"attn_output.bias", c.embd, false)
		if c.arch == "qwen3" {
			c.vector(blk+"attn_q_norm.weight", c.headDim, true)
			c.vector(blk+"attn_k_norm.weight", c.headDim, true)
		}
		c.vector(blk+"ffn_norm.weight", c.embd, true)
		c.matrix(blk+"ffn_gate.weight", c.embd, c.ff[i], true)
		c.matrix(blk+"ffn_up.weight", c.embd, c.ff[i], true)
		c.matrix(blk+"ffn_down.weight", c.ff[i], c.embd, true)
		c.vector(blk+"ffn_gate.bias", c.ff[i], false)
		c.vector(blk+"ffn_up.bias", c.ff[i], false)
		c.vector(blk+"ffn_down.bias", c.embd, false)
	}
}

// shape finds a tensor and compares its shape; ok is false if it is missing or wrong.
func (c *checker) shape(name string, required bool, want ...int64) (Tensor, bool) {
	t, ok := c.f.Tensor(name)
	what := fmt.Sprintf("tensor %q", name)
	if !ok {
		if required {
			c.fail(what, "is missing")
		}
		return t, false
	}
	got := t.Shape
	for len(got) > len(want) && got[len(got)-1] == 1 {
		got = got[:len(got)-1]
	}
	if !slices.Equal(got, want) {
		c.fail(what, "has shape %v, expected %v", t.Shape, want)
		return t, false
	}
	return t, true
}

// matrix checks a weight of rows rows of rowLength elements.
func (c *checker) matrix(name string, rowLength, rows int64, required bool) {
	if t, ok := c.shape(name, required, rowLength, rows); ok && !layouts[t.Type].weights {
		c.fail(fmt.Sprintf("tensor %q", name), "is of type %s, which is no type for weights", t.Type)
	}
}

// vector checks a norm, bias or table: ggml adds and multiplies with F32 only.
func (c *checker) vector(name string, length int64, required bool) {
	if t, ok := c.shape(name, required, length); ok && t.Type != F32 {
		c.fail(fmt.Sprintf("tensor %q", name), "is of type %s, expected f32", t.Type)
	}
}
