package train

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
)

// shape8B is that of Llama 3 8B and of DeepSeek-R1-Distill-Llama-8B.
var shape8B = struct{ embedding, feedForward, layers, heads, kvHeads, vocabulary int }{4096, 14336, 32, 32, 8, 128256}

// writeRandom writes a Llama of random Q4_0 weights with a deviation of 0.02 or so. One random matrix serves all: values
// do not change the speed.
func writeRandom(path string, layers int) error {
	s := shape8B
	random := rand.New(rand.NewPCG(1, 2))
	block := make([]byte, 18*s.embedding/32*s.vocabulary)
	for i := 0; i+8 <= len(block); i += 8 {
		word := random.Uint64()
		for j := range 8 {
			block[i+j] = byte(word >> (8 * j))
		}
	}
	for i := 0; i < len(block); i += 18 {
		block[i], block[i+1] = 0x00, 0x1d // 0.00488
	}
	matrix := func(name string, in, out int) gguf.TensorData {
		return gguf.TensorData{Name: name, Shape: []int64{int64(in), int64(out)}, Type: gguf.Q4_0, Data: block[:in/32*18*out]}
	}
	ones := make([]byte, 4*s.embedding)
	for i := 0; i < len(ones); i += 4 {
		ones[i+2], ones[i+3] = 0x80, 0x3f
	}
	vector := func(name string) gguf.TensorData {
		return gguf.TensorData{Name: name, Shape: []int64{int64(s.embedding)}, Type: gguf.F32, Data: ones}
	}
	tensors := []gguf.TensorData{matrix("token_embd.weight", s.embedding, s.vocabulary), vector("output_norm.weight"), matrix("output.weight", s.embedding, s.vocabulary)}
	kv := s.embedding / s.heads * s.kvHeads
	for i := range layers {
		name := func(suffix string) string { return fmt.Sprintf("blk.%d.%s.weight", i, suffix) }
		tensors = append(tensors, vector(name("attn_norm")), vector(name("ffn_norm")),
			matrix(name("attn_q"), s.embedding, s.embedding), matrix(name("attn_k"), s.embedding, kv), matrix(name("attn_v"), s.embedding, kv),
			matrix(name("attn_output"), s.embedding, s.embedding), matrix(name("ffn_gate"), s.embedding, s.feedForward),
			matrix(name("ffn_up"), s.embedding, s.feedForward), matrix(name("ffn_down"), s.feedForward, s.embedding))
	}
	metadata := []gguf.KeyValue{
		{Key: "general.architecture", Value: "llama"}, {Key: "llama.block_count", Value: uint32(layers)}, {Key: "llama.context_length", Value: uint32(8192)},
		{Key: "llama.embedding_length", Value: uint32(s.embedding)}, {Key: "llama.feed_forward_length", Value: uint32(s.feedForward)},
		{Key: "llama.attention.head_count", Value: uint32(s.heads)}, {Key: "llama.attention.head_count_kv", Value: uint32(s.kvHeads)},
		{Key: "llama.attention.layer_norm_rms_epsilon", Value: float32(1e-5)}, {Key: "llama.rope.freq_base", Value: float32(5e5)},
		{Key: "llama.rope.dimension_count", Value: uint32(s.embedding / s.heads)}, {Key: "llama.vocab_size", Value: uint32(s.vocabulary)},
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return gguf.Write(f, metadata, tensors)
}

const commonPrefix = 25

// questions are rows of random tokens: the lengths are lognormal (sigma 0.40, 61 to 256, a mean of about 120), and the
// first 25 tokens are the same in all.
func questions(n, vocabulary int) [][]engine.Token {
	random := rand.New(rand.NewPCG(3, 4))
	prefix := make([]engine.Token, commonPrefix)
	for i := range prefix {
		prefix[i] = engine.Token(random.IntN(vocabulary))
	}
	rows := make([][]engine.Token, n)
	for i := range rows {
		length := min(256, max(61, int(111*math.Exp(0.40*random.NormFloat64()))))
		rows[i] = slices.Clone(prefix)
		for len(rows[i]) < length {
			rows[i] = append(rows[i], engine.Token(random.IntN(vocabulary)))
		}
	}
	return rows
}

// sharePrefix packs rows into one tree, with a loss on all tokens.
func sharePrefix(rows [][]engine.Token, random *rand.Rand) engine.Batch {
	b := engine.Batch{Tokens: slices.Clone(rows[0][:commonPrefix]), Segments: []engine.Segment{{Start: 0, End: commonPrefix, Parent: -1}}}
	for i := range commonPrefix - 1 {
		b.Targets = append(b.Targets, engine.Target{Position: i, Label: rows[0][i+1], Weight: float32(len(rows))})
	}
	first := map[engine.Token]float32{}
	for _, row := range rows {
		first[row[commonPrefix]]++
	}
	for token, weight := range first {
		b.Targets = append(b.Targets, engine.Target{Position: commonPrefix - 1, Label: token, Weight: weight})
	}
	slices.SortFunc(b.Targets, func(x, y engine.Target) int {
		return cmp.Or(cmp.Compare(x.Position, y.Position), cmp.Compare(x.Label, y.Label))
	})
	for _, row := range rows {
		start := len(b.Tokens)
		b.Tokens = append(b.Tokens, row[commonPrefix:]...)
		b.Segments = append(b.Segments, engine.Segment{Start: start, End: len(b.Tokens), Parent: 0})
		for i := start; i+1 < len(b.Tokens); i++ {
			b.Targets = append(b.Targets, engine.Target{Position: i, Label: b.Tokens[i+1], Weight: 1})
		}
	}
	for range b.Tokens {
		b.Seeds = append(b.Seeds, random.Uint32())
	}
	return b
}

// TestDeviceSpeed trains a Llama-8B-shaped model of random 4-bit weights on a GPU as the first user did: r 8 on q and v,
// dropout 0.05, loss on all tokens. HONE_BENCH lists runs as layout:batch:micro-batch tokens:steps[:recompute], such as
// "f16/bf16:8:4096:40 stored/stored:8:1024:20"; HONE_BENCH_MODEL is where the model is or will be, HONE_BENCH_LAYERS fewer
// layers for a try. It runs where HONE_TEST_GPU names the libraries, and with HONE_BENCH alone on the CPU.
func TestDeviceSpeed(t *testing.T) {
	runs := strings.Fields(os.Getenv("HONE_BENCH"))
	if len(runs) == 0 {
		t.Skip("HONE_BENCH is not set")
	}
	layers := shape8B.layers
	if n, err := strconv.Atoi(os.Getenv("HONE_BENCH_LAYERS")); err == nil {
		layers = n
	}
	path := cmp.Or(os.Getenv("HONE_BENCH_MODEL"), filepath.Join(t.TempDir(), "llama8b-q4_0.gguf"))
	if _, err := os.Stat(path); err != nil {
		start := time.Now()
		if err := writeRandom(path, layers); err != nil {
			t.Fatal(err)
		}
		t.Logf("wrote %s in %.1f s", path, time.Since(start).Seconds())
	}
	for _, run := range runs {
		t.Run(run, func(t *testing.T) { speed(t, path, strings.Split(run, ":")) })
	}
}

func speed(t *testing.T, path string, fields []string) {
	number := func(i int) int {
		n, err := strconv.Atoi(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	layout, err := graph.ParseLayout(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	batchSize, microTokens, steps := number(1), number(2), number(3)
	start := time.Now()
	probe, err := openBackend(1)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := probe.Device()
	probe.Close()
	backend, model := loadModel(t, path, layout, 2)
	model.Recompute = len(fields) > 4 && fields[4] == "recompute"
	lora, err := model.NewLoRA(graph.LoRAOptions{Rank: 8, Alpha: 16, Dropout: 0.05, Modules: []graph.Module{graph.Query, graph.Value}})
	if err != nil {
		t.Fatal(err)
	}
	defer lora.Close()
	initialise(lora, "true", 1)
	t.Logf("%s: loaded in %.1f s", layout, time.Since(start).Seconds())
	rows := questions(1000, model.Vocabulary)
	real := 0
	for _, row := range rows {
		real += len(row)
	}
	random := rand.New(rand.NewPCG(5, 6))
	m := newMoments(len(lora.Parameters))
	optimizer := AdamW{Beta1: 0.9, Beta2: 0.999, Epsilon: 1e-8}
	var times []float64
	var computed, asked, micros int
	var inGradients, total time.Duration
	var last engine.Batch
	const warm = 3
	losses := 0.0
	// The steps' micro-batches are packed ahead, as the trainer does.
	type packed struct {
		micros []engine.Batch
		weight int
	}
	packs := make([]packed, steps+warm)
	at := 0
	for i := range packs {
		todo := make([][]engine.Token, batchSize)
		for j := range todo {
			todo[j] = rows[(at+j)%len(rows)]
			packs[i].weight += len(todo[j]) - 1
		}
		at += batchSize
		for len(todo) > 0 {
			n, tokens := 0, commonPrefix
			for n < len(todo) && (n == 0 || tokens+len(todo[n])-commonPrefix <= microTokens) {
				tokens += len(todo[n]) - commonPrefix
				n++
			}
			packs[i].micros = append(packs[i].micros, sharePrefix(todo[:n], random))
			todo = todo[n:]
		}
	}
	for step := range steps + warm {
		began := time.Now()
		if step == warm {
			computed, asked, micros, inGradients, total = 0, 0, 0, 0, 0
		}
		clear(lora.Gradients)
		weight := packs[step].weight
		for i := range packs[step].micros {
			last = packs[step].micros[i]
			computed += len(last.Tokens)
			micros++
			model.Ahead(lora, 1, func() (engine.Batch, bool) {
				switch {
				case i+1 < len(packs[step].micros):
					return packs[step].micros[i+1], true
				case step+1 < len(packs):
					return packs[step+1].micros[0], true
				}
				return engine.Batch{}, false
			})
			inside := time.Now()
			result, err := model.Gradients(last, lora, 1)
			if err != nil {
				t.Fatal(err)
			}
			inGradients += time.Since(inside)
			losses = 0
			for i, l := range result.Losses {
				losses += float64(l*last.Targets[i].Weight) / float64(weight)
			}
		}
		size := norm(lora.Gradients) / float64(weight)
		if math.IsNaN(size) || size == 0 {
			t.Fatalf("step %d: gradient norm %g", step, size)
		}
		optimizer.step(lora.Parameters, lora.Gradients, m, min(1, 1/size)/float64(weight), 2e-4, step+1)
		asked += batchSize
		times = append(times, time.Since(began).Seconds())
		total += time.Since(began)
	}
	times = times[warm:]
	seconds := 0.0
	for _, s := range times {
		seconds += s
	}
	slices.Sort(times)
	tokens := float64(real) / float64(len(rows))
	perToken := 2 * 2 * float64(model.Parameters()+model.Vocabulary*model.Embedding) // forward and the gradient of inputs
	t.Logf("RESULT %s batch %d, %d tokens a micro-batch: %.1f questions/s (median step %.1f ms = %.1f questions/s), %.0f real tokens/s, %.0f computed tokens/s, %.1f TFLOP/s of products; %.1f micro-batches of %.0f tokens a step; in Gradients %.1f%%; last loss %.3f",
		layout, batchSize, microTokens, float64(asked)/seconds, 1000*times[len(times)/2], float64(batchSize)/times[len(times)/2],
		float64(asked)/seconds*tokens, float64(computed)/seconds, float64(computed)/seconds*perToken/1e12,
		float64(micros)/float64(len(times)), float64(computed)/float64(micros), 100*inGradients.Seconds()/total.Seconds(), losses)
	if after, ok := backend.Device(); ok {
		t.Logf("MEMORY used by this run %.2f GiB, of %.2f GiB used on the device; activations %.2f GiB", float64(before.FreeBytes-after.FreeBytes)/(1<<30), float64(after.MemoryBytes-after.FreeBytes)/(1<<30), float64(model.ActivationBytes())/(1<<30))
	}
	costs, err := model.Profile(last, lora)
	if err != nil {
		t.Fatal(err)
	}
	list := make([]ggml.Cost, 0, len(costs))
	sum := time.Duration(0)
	for _, c := range costs {
		list = append(list, c)
		sum += c.Time
	}
	slices.SortFunc(list, func(a, b ggml.Cost) int { return cmp.Compare(b.Time, a.Time) })
	t.Logf("PROFILE of a micro-batch of %d tokens, node by node: %.1f ms", len(last.Tokens), 1000*sum.Seconds())
	for _, c := range list[:min(len(list), 40)] {
		t.Logf("PROFILE %7.2f ms %5d x %7.1f us  %s", 1000*c.Time.Seconds(), c.Nodes, 1e6*c.Time.Seconds()/float64(c.Nodes), c.Kind)
	}
}
