package enginetest

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/hone-llm/hone/internal/gguf"
)

// Model describes a tiny random model of two layers: 4 query heads over 2 key-value heads, embedding 64, feed-forward 96,
// 101 tokens.
type Model struct {
	Name         string
	Architecture string    // llama, qwen2 (biases of q, k, v) or qwen3 (norms of the heads of q and k)
	Type         gguf.Type // of every matrix: f32, f16, bf16, q8_0, q5_0, q5_1, q4_0 or q4_1
	HeadSize     int
	Tied         bool    // the head is the embedding
	RopeFactors  bool    // Llama 3's divisors of the rotary frequencies
	RopeScaling  float32 // factor of linear scaling; 0: none
}

// The sizes of every Model.
const (
	layers, embedding, feedForward   = 2, 64, 96
	queryHeads, keyHeads, vocabulary = 4, 2, 101
)

// Models are the shapes of the suite: every architecture, both pairings of rotary embedding, each kind of scaling, heads
// that are wider than the embedding together, tied and untied heads, and every base type that the reference expands.
var Models = []Model{
	{Name: "llama", Architecture: "llama", Type: gguf.F32, HeadSize: 16},
	{Name: "llama-tied-scaled", Architecture: "llama", Type: gguf.F32, HeadSize: 16, Tied: true, RopeScaling: 4},
	{Name: "llama3", Architecture: "llama", Type: gguf.F32, HeadSize: 16, RopeFactors: true},
	{Name: "qwen2", Architecture: "qwen2", Type: gguf.F32, HeadSize: 16, Tied: true},
	{Name: "qwen3", Architecture: "qwen3", Type: gguf.F32, HeadSize: 32},
	{Name: "llama-f16", Architecture: "llama", Type: gguf.F16, HeadSize: 16},
	{Name: "llama-bf16", Architecture: "llama", Type: gguf.BF16, HeadSize: 16},
	{Name: "llama-q8_0", Architecture: "llama", Type: gguf.Q8_0, HeadSize: 16, Tied: true},
	{Name: "llama-q5_0", Architecture: "llama", Type: gguf.Q5_0, HeadSize: 16},
	{Name: "llama-q5_1", Architecture: "llama", Type: gguf.Q5_1, HeadSize: 16},
	{Name: "qwen2-q4_0", Architecture: "qwen2", Type: gguf.Q4_0, HeadSize: 16},
	{Name: "qwen3-q4_1", Architecture: "qwen3", Type: gguf.Q4_1, HeadSize: 32},
}

// Write writes the model to a temporary file. Equal models have equal weights.
func (m Model) Write(t testing.TB) (path string) {
	t.Helper()
	random := rand.New(rand.NewPCG(11, 12))
	key := func(name string, value any) gguf.KeyValue {
		return gguf.KeyValue{Key: m.Architecture + "." + name, Value: value}
	}
	metadata := []gguf.KeyValue{
		{Key: "general.architecture", Value: m.Architecture},
		key("block_count", uint32(layers)), key("context_length", uint32(512)), key("embedding_length", uint32(embedding)),
		key("feed_forward_length", uint32(feedForward)), key("attention.head_count", uint32(queryHeads)),
		key("attention.head_count_kv", uint32(keyHeads)), key("attention.key_length", uint32(m.HeadSize)),
		key("attention.value_length", uint32(m.HeadSize)), key("attention.layer_norm_rms_epsilon", float32(1e-5)),
		key("rope.freq_base", float32(10000)),
	}
	if m.RopeScaling != 0 {
		metadata = append(metadata, key("rope.scaling.type", "linear"), key("rope.scaling.factor", m.RopeScaling))
	}
	var tensors []gguf.TensorData
	matrix := func(name string, in, out int) {
		deviation := 1 / math.Sqrt(float64(in))
		tensors = append(tensors, gguf.TensorData{Name: name, Shape: []int64{int64(in), int64(out)}, Type: m.Type, Data: randomWeights(random, m.Type, in*out, deviation)})
	}
	vector := func(name string, n int, value func() float64) {
		values := make([]float32, n)
		for i := range values {
			values[i] = float32(value())
		}
		tensors = append(tensors, gguf.TensorData{Name: name, Shape: []int64{int64(n)}, Type: gguf.F32, Data: gguf.Float32Bytes(values)})
	}
	nearOne := func() float64 { return 1 + 0.2*random.NormFloat64() }
	bias := func() float64 { return 0.3 * random.NormFloat64() }
	q, kv := queryHeads*m.HeadSize, keyHeads*m.HeadSize
	matrix("token_embd.weight", embedding, vocabulary)
	if !m.Tied {
		matrix("output.weight", embedding, vocabulary)
	}
	vector("output_norm.weight", embedding, nearOne)
	if m.RopeFactors {
		vector("rope_freqs.weight", m.HeadSize/2, func() float64 { return 1 + 7*random.Float64() })
	}
	for i := range layers {
		prefix := fmt.Sprintf("blk.%d.", i)
		vector(prefix+"attn_norm.weight", embedding, nearOne)
		matrix(prefix+"attn_q.weight", embedding, q)
		matrix(prefix+"attn_k.weight", embedding, kv)
		matrix(prefix+"attn_v.weight", embedding, kv)
		matrix(prefix+"attn_output.weight", q, embedding)
		vector(prefix+"ffn_norm.weight", embedding, nearOne)
		matrix(prefix+"ffn_gate.weight", embedding, feedForward)
		matrix(prefix+"ffn_up.weight", embedding, feedForward)
		matrix(prefix+"ffn_down.weight", feedForward, embedding)
		switch m.Architecture {
		case "qwen2":
			vector(prefix+"attn_q.bias", q, bias)
			vector(prefix+"attn_k.bias", kv, bias)
			vector(prefix+"attn_v.bias", kv, bias)
		case "qwen3":
			vector(prefix+"attn_q_norm.weight", m.HeadSize, nearOne)
			vector(prefix+"attn_k_norm.weight", m.HeadSize, nearOne)
		}
	}
	path = filepath.Join(t.TempDir(), m.Name+".gguf")
	if err := gguf.WriteFile(path, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	return path
}

// randomWeights encodes n random weights. Of the quantised types it draws the bits of the blocks, not the weights, so it
// needs no quantiser: d is chosen for the deviation that uniform integers then have.
func randomWeights(random *rand.Rand, t gguf.Type, n int, deviation float64) []byte {
	block := map[gguf.Type]struct {
		bits   float64 // of one weight
		centre bool    // d is followed by m, the value of integer 0
	}{
		gguf.Q8_0: {8, false}, gguf.Q5_0: {5, false}, gguf.Q5_1: {5, true}, gguf.Q4_0: {4, false}, gguf.Q4_1: {4, true},
	}[t]
	var data []byte
	for range int64(n) / t.BlockSize() {
		weight := float32(deviation * random.NormFloat64())
		switch t {
		case gguf.F32:
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(weight))
		case gguf.BF16:
			data = binary.LittleEndian.AppendUint16(data, uint16(math.Float32bits(weight)>>16))
		case gguf.F16:
			data = binary.LittleEndian.AppendUint16(data, half(float64(weight)))
		default:
			levels := math.Exp2(block.bits)
			d := deviation * math.Sqrt(12) / levels * (0.5 + random.Float64())
			start := len(data)
			data = binary.LittleEndian.AppendUint16(data, half(d))
			if block.centre {
				data = binary.LittleEndian.AppendUint16(data, half(-d*(levels-1)/2))
			}
			for int64(len(data)-start) < t.TypeBytes() {
				data = append(data, byte(random.Uint32()))
			}
		}
	}
	return data
}

// half encodes x as an IEEE 754 binary16, rounded towards 0; what is too small for a normal number becomes 0.
func half(x float64) uint16 {
	var sign uint16
	if x < 0 {
		sign = 1 << 15
	}
	fraction, exponent := math.Frexp(math.Abs(x)) // fraction in [0.5, 1)
	if exponent < -13 {
		return sign
	}
	return sign | uint16(exponent+14)<<10 | uint16(fraction*2048)&1023
}
