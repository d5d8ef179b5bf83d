package graph_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/engine/enginetest"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/modeltest"
)

func newServer(t testing.TB, path string, o graph.ServerOptions) *graph.Server {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s, err := graph.NewServer(file, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func randomTokens(seed uint64, vocabulary, n int) []engine.Token {
	random := rand.New(rand.NewPCG(seed, 1))
	tokens := make([]engine.Token, n)
	for i := range tokens {
		tokens[i] = engine.Token(random.IntN(vocabulary))
	}
	return tokens
}

// decode computes the parts and returns a copy of all outputs, [part][wanted][].
func decode(t testing.TB, s *graph.Server, parts ...engine.Part) [][][]float32 {
	t.Helper()
	if err := s.Decode(parts); err != nil {
		t.Fatal(err)
	}
	out := make([][][]float32, len(parts))
	for i := range parts {
		for j := 0; ; j++ {
			row := s.Output(i, j)
			if row == nil {
				break
			}
			out[i] = append(out[i], append([]float32(nil), row...))
		}
	}
	return out
}

// trainerLogits are those of every token by the trainer's forward pass on float32 weights.
func trainerLogits(t testing.TB, path string, tokens []engine.Token) [][]float32 {
	t.Helper()
	m := load(t, path, graph.Layout{Forward: ggml.F32, Backward: ggml.F32})
	b := engine.Batch{Tokens: tokens, Segments: engine.Rows(len(tokens))}
	for i := range tokens {
		b.Targets = append(b.Targets, engine.Target{Position: i, Weight: 1})
	}
	logits, err := m.Logits(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	return logits
}

// TestServerLogits compares every architecture and type with the trainer's forward pass on dequantised weights. Float
// weights differ by the rounding of Packed and of the float16 cache, quantised ones by that of activations to int8.
func TestServerLogits(t *testing.T) {
	for _, model := range enginetest.Models {
		t.Run(model.Name, func(t *testing.T) {
			path := model.Write(t)
			tokens := randomTokens(1, 101, 70)
			want := trainerLogits(t, path, tokens)
			bound := 0.005
			if model.Type != gguf.F32 && model.Type != gguf.F16 && model.Type != gguf.BF16 {
				bound = 0.1
			}
			s := newServer(t, path, graph.ServerOptions{Threads: 2, Sequences: 2, CacheTokens: 256})
			got := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantAll})[0]
			worst := 0.0
			for i := range want {
				worst = max(worst, distance(got[i], want[i]))
			}
			t.Logf("relative distance at most %.2g", worst)
			if !(worst < bound) {
				t.Errorf("relative distance %g, expected less than %g", worst, bound)
			}
		})
	}
	t.Run("default", func(t *testing.T) {
		path := modeltest.Path(t)
		tokens := randomTokens(2, 49152, 100)
		want := trainerLogits(t, path, tokens)
		s := newServer(t, path, graph.ServerOptions{Threads: 2, Sequences: 2, CacheTokens: 256})
		got := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantAll})[0]
		worst := 0.0
		for i := range want {
			worst = max(worst, distance(got[i], want[i]))
		}
		reference := 0.0
		for i, logits := range llamaLogits(t, path, tokens) {
			reference = max(reference, distance(logits, want[i]))
		}
		t.Logf("relative distance at most %.2g, that of llama.cpp %.2g", worst, reference)
		if !(worst < 0.2) {
			t.Errorf("relative distance %g, expected less than 0.2", worst)
		}
	})
}

// llamaLogits are those of every token by llama.cpp.
func llamaLogits(t testing.TB, path string, tokens []engine.Token) [][]float32 {
	t.Helper()
	m, err := llama.LoadModel(path, llama.ModelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	c, err := llama.NewContext(m, llama.ContextOptions{Tokens: 1024, Threads: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := llama.NewBatch(len(tokens))
	defer b.Close()
	for i, token := range tokens {
		b.Add(token, i, 0, true)
	}
	if err := c.Decode(b); err != nil {
		t.Fatal(err)
	}
	var out [][]float32
	for i := range tokens {
		out = append(out, slices.Clone(c.Logits(i)))
	}
	return out
}

// wanted is what a part's outputs must be: those of the same tokens computed alone and at once, bit for bit.
func same(t *testing.T, what string, got, want [][]float32) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d outputs, expected %d", what, len(got), len(want))
	}
	for i := range want {
		for j := range want[i] {
			if math.Float32bits(got[i][j]) != math.Float32bits(want[i][j]) {
				t.Fatalf("%s: output %d differs at %d: %g, expected %g", what, i, j, got[i][j], want[i][j])
			}
		}
	}
}

// TestServerBits: what a token gets does not depend on how the prompt is cut, on the rest of the batch, on sharing, or on
// the threads.
func TestServerBits(t *testing.T) {
	paths := map[string]string{"default": modeltest.Path(t)}
	for _, m := range enginetest.Models {
		paths[m.Name] = m.Write(t)
	}
	for name, path := range paths {
		for _, cache := range []ggml.Type{ggml.F16, ggml.Q8_0} {
			if cache == ggml.Q8_0 && !(name == "default" || strings.HasPrefix(name, "qwen3")) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", name, gguf.Type(cache)), func(t *testing.T) {
				o := graph.ServerOptions{Threads: 2, Sequences: 20, CacheTokens: 4096, CacheType: cache}
				s := newServer(t, path, o)
				vocabulary := s.Limits().Vocabulary
				tokens := randomTokens(3, vocabulary, 150)
				want := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantAll})[0]
				clear := func() {
					for i := range s.Limits().Sequences {
						s.Truncate(engine.Sequence(i), 0)
					}
				}
				for _, threads := range []int{1, 3} {
					o.Threads = threads
					other := newServer(t, path, o)
					same(t, fmt.Sprintf("%d threads", threads), decode(t, other, engine.Part{Tokens: tokens, Want: engine.WantAll})[0], want)
				}
				for _, chunk := range []int{1, 7, 16, 64, 149} {
					clear()
					var got [][]float32
					for at := 0; at < len(tokens); at += chunk {
						part := engine.Part{Sequence: 1, Position: at, Tokens: tokens[at:min(at+chunk, len(tokens))], Want: engine.WantAll}
						got = append(got, decode(t, s, part)[0]...)
					}
					same(t, fmt.Sprintf("in parts of %d", chunk), got, want)
				}
				clear()
				// Among fifteen others of different lengths, which go on with one token each.
				var got [][]float32
				held := make([]int, 16)
				for at, step := 0, 0; at < len(tokens); step++ {
					var parts []engine.Part
					n := []int{40, 1, 1, 17, 1, 60, 1}[step%7]
					n = min(n, len(tokens)-at)
					for i := range 16 {
						p := engine.Part{Sequence: engine.Sequence(i), Position: held[i], Want: engine.Want(i % 4)}
						p.Tokens = randomTokens(uint64(i+100*step), vocabulary, 1+i*(step%2))
						if i == 9 {
							p.Tokens, p.Want = tokens[at:at+n], engine.WantAll
						}
						held[i] += len(p.Tokens)
						parts = append(parts, p)
					}
					got = append(got, decode(t, s, parts...)[9]...)
					at += n
				}
				same(t, "in a batch of 16", got, want)
				// The first 70 tokens shared by several, each of which goes on.
				for _, n := range []int{64, 70} {
					clear()
					decode(t, s, engine.Part{Sequence: 2, Tokens: tokens[:n+3]})
					for to := range engine.Sequence(2) {
						if !s.Share(2, to+3, n) {
							t.Fatal("not shared")
						}
					}
					// Both grow, and so does the one whose cells they share.
					decode(t, s, engine.Part{Sequence: 2, Position: n + 3, Tokens: randomTokens(9, vocabulary, 20)})
					decode(t, s, engine.Part{Sequence: 3, Position: n, Tokens: randomTokens(8, vocabulary, 20)})
					same(t, "shared", decode(t, s, engine.Part{Sequence: 4, Position: n, Tokens: tokens[n:], Want: engine.WantAll})[0], want[n:])
				}
			})
		}
	}
}

// writeAdapter writes a random adapter of the trainer's as adapter.gguf and returns it with its path.
func writeAdapter(t testing.TB, m *graph.Model, file *gguf.File, seed uint64, deviation float64, o graph.LoRAOptions) (*graph.LoRA, string) {
	t.Helper()
	l, err := m.NewLoRA(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	random := rand.New(rand.NewPCG(seed, 77))
	architecture, _ := file.Metadata.String("general.architecture")
	metadata := []gguf.KeyValue{
		{Key: "general.type", Value: "adapter"}, {Key: "general.architecture", Value: architecture},
		{Key: "adapter.type", Value: "lora"}, {Key: "adapter.lora.alpha", Value: float32(o.Alpha)},
	}
	var tensors []gguf.TensorData
	for _, p := range l.Parts {
		a, b := make([]float32, o.Rank*p.In), make([]float32, p.Out*o.Rank)
		for _, half := range [][]float32{a, b} {
			for i := range half {
				half[i] = float32(random.NormFloat64() * deviation)
			}
		}
		l.SetMatrices(p, a, b)
		name := fmt.Sprintf("blk.%d.%s.weight", p.Layer, p.Module.TensorName())
		tensors = append(tensors,
			gguf.TensorData{Name: name + gguf.SuffixA, Shape: []int64{int64(p.In), int64(o.Rank)}, Type: gguf.F32, Data: gguf.Float32Bytes(a)},
			gguf.TensorData{Name: name + gguf.SuffixB, Shape: []int64{int64(o.Rank), int64(p.Out)}, Type: gguf.F32, Data: gguf.Float32Bytes(b)})
	}
	path := filepath.Join(t.TempDir(), "adapter.gguf")
	if err := gguf.WriteFile(path, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	return l, path
}

// TestServerAdapters: logits with an adapter are the trainer's, and in a batch with the base and other adapters they are
// those that each has alone, bit for bit.
func TestServerAdapters(t *testing.T) {
	paths := map[string]string{"default": modeltest.Path(t)}
	for _, m := range enginetest.Models {
		paths[m.Name] = m.Write(t)
	}
	kinds := []graph.LoRAOptions{
		{Rank: 8, Alpha: 16, Modules: graph.AllLinear}, {Rank: 3, Alpha: 16, Modules: []graph.Module{graph.Query, graph.Value}},
		{Rank: 17, Alpha: 5, Modules: []graph.Module{graph.Output, graph.Down}}, {Rank: 4, Alpha: 4, Modules: []graph.Module{graph.Gate}, Layers: []int{1}},
	}
	for name, path := range paths {
		t.Run(name, func(t *testing.T) {
			file, err := gguf.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			m := load(t, path, graph.Layout{Forward: ggml.F32, Backward: ggml.F32})
			s := newServer(t, path, graph.ServerOptions{Threads: 2, Sequences: 16, CacheTokens: 4096})
			vocabulary := s.Limits().Vocabulary
			tokens := randomTokens(4, vocabulary, 40)
			batch := engine.Batch{Tokens: tokens, Segments: engine.Rows(len(tokens))}
			for i := range tokens {
				batch.Targets = append(batch.Targets, engine.Target{Position: i, Weight: 1})
			}
			adapters := []engine.Adapter{nil}
			plain, err := m.Logits(batch, nil)
			if err != nil {
				t.Fatal(err)
			}
			alone := [][][]float32{decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantAll})[0]}
			rounding := 0.0
			for i := range plain {
				rounding = max(rounding, distance(alone[0][i], plain[i]))
			}
			for i, o := range kinds {
				deviation := 0.05
				if name == "default" {
					deviation = 0.02
				}
				lora, adapterPath := writeAdapter(t, m, file, uint64(i), deviation, o)
				a, err := s.LoadAdapter(adapterPath)
				if err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				adapters = append(adapters, a)
				want, err := m.Logits(batch, lora)
				if err != nil {
					t.Fatal(err)
				}
				s.Truncate(0, 0)
				alone = append(alone, decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantAll, Adapter: a})[0])
				worst, changed := 0.0, 0.0
				for j := range want {
					worst, changed = max(worst, distance(alone[i+1][j], want[j])), max(changed, distance(plain[j], want[j]))
				}
				t.Logf("%v rank %d: off by %.2g, the base by %.2g; the adapter changes %.2g", o.Modules, o.Rank, worst, rounding, changed)
				// Activations rounded to int8 are off by different amounts with and without the adapter; of float weights, an
				// adapter that was left out or scaled otherwise would show.
				if worst > 5*rounding+0.002 || rounding < 0.01 && changed < 10*worst {
					t.Errorf("%v rank %d: off by %g, the base by %g; the adapter changes %g", o.Modules, o.Rank, worst, rounding, changed)
				}
			}
			// All at once, as a prompt and then token by token; of each adapter three sequences of different lengths.
			for i := range s.Limits().Sequences {
				s.Truncate(engine.Sequence(i), 0)
			}
			got := make([][][]float32, 15)
			for at, step := 0, 0; at < len(tokens); step++ {
				n := min([]int{30, 1, 5, 4}[step%4], len(tokens)-at)
				var parts []engine.Part
				for i := range got {
					p := engine.Part{Sequence: engine.Sequence(i), Position: at, Tokens: tokens[at : at+n], Adapter: adapters[i%len(adapters)], Want: engine.WantAll}
					parts = append(parts, p)
				}
				for i, rows := range decode(t, s, parts...) {
					got[i] = append(got[i], rows...)
				}
				at += n
			}
			for i := range got {
				same(t, fmt.Sprintf("adapter %d in a batch", i%len(adapters)), got[i], alone[i%len(adapters)])
			}
		})
	}
}

// TestServerState: the states of all tokens, beside logits in the same batch, give those logits.
func TestServerState(t *testing.T) {
	path := enginetest.Models[0].Write(t)
	s := newServer(t, path, graph.ServerOptions{Sequences: 3, CacheTokens: 100})
	tokens := randomTokens(5, 101, 20)
	alone := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantState})[0]
	logits := decode(t, s, engine.Part{Sequence: 1, Tokens: tokens, Want: engine.WantAll})[0]
	s.Truncate(0, 0)
	s.Truncate(1, 0)
	mixed := decode(t, s, engine.Part{Sequence: 1, Tokens: tokens, Want: engine.WantState}, engine.Part{Sequence: 2, Tokens: tokens[:7]}, engine.Part{Tokens: tokens, Want: engine.WantAll})
	same(t, "states", mixed[0], alone)
	same(t, "logits", mixed[2], logits)
	if len(alone) != 20 || len(alone[0]) != s.Limits().Embedding || len(mixed[1]) != 0 {
		t.Errorf("%d states of %d elements, and %d outputs that nobody wants", len(alone), len(alone[0]), len(mixed[1]))
	}
	if got := s.FreeTokens(); got >= 100 {
		t.Errorf("%d tokens are free of 100", got)
	}
}

func openFile(t testing.TB, path string) *gguf.File {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

// TestServerAgreesWithLlama: on a text, the best token is that of llama.cpp wherever the two best are farther apart than
// both engines' roundings, which are those of activations to int8 in both.
func TestServerAgreesWithLlama(t *testing.T) {
	path := modeltest.Path(t)
	llama.Open(llama.Options{})
	m, err := llama.LoadModel(path, llama.ModelOptions{VocabularyOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := m.Tokenize(string(text[:3000]), true, false)
	if err != nil {
		t.Fatal(err)
	}
	tokens = tokens[:min(len(tokens), 500)]
	exact, other := trainerLogits(t, path, tokens), llamaLogits(t, path, tokens)
	s := newServer(t, path, graph.ServerOptions{Threads: 2, Sequences: 1, CacheTokens: 512})
	own := decode(t, s, engine.Part{Tokens: tokens, Want: engine.WantAll})[0]
	var distances [3]float64
	differ, worst, bound := 0, 0.0, 0.0
	for i := range tokens {
		distances[0] += distance(own[i], exact[i]) / float64(len(tokens))
		distances[1] += distance(other[i], exact[i]) / float64(len(tokens))
		distances[2] += distance(own[i], other[i]) / float64(len(tokens))
		for j := range own[i] {
			bound = max(bound, math.Abs(float64(own[i][j]-other[i][j])))
		}
		if a, b := best(own[i]), best(other[i]); a != b {
			differ++
			worst = max(worst, float64(other[i][b]-other[i][a]))
		}
	}
	t.Logf("relative distances: own to exact %.3g, llama.cpp to exact %.3g, own to llama.cpp %.3g", distances[0], distances[1], distances[2])
	t.Logf("%d of %d best tokens differ, at gaps of at most %.3g; logits differ by at most %.3g", differ, len(tokens), worst, bound)
	if distances[0] > 1.2*distances[1] {
		t.Errorf("the distance to exact weights is %g, llama.cpp's %g", distances[0], distances[1])
	}
	if worst > 1 || differ > len(tokens)/20 {
		t.Errorf("%d best tokens differ, at gaps up to %g", differ, worst)
	}
}

func best(logits []float32) int {
	b := 0
	for i, v := range logits {
		if v > logits[b] {
			b = i
		}
	}
	return b
}
