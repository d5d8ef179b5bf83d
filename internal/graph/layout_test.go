package graph_test

import (
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
)

// testModels are the tiny models of the trainer's golden files, over all architectures and many types of weights.
func testModels(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob("../train/testdata/*.gguf")
	if err != nil || len(paths) == 0 {
		t.Fatalf("models in ../train/testdata: %v, %v", paths, err)
	}
	return paths
}

// load opens a model, which is closed when the test ends.
func load(t testing.TB, path string, layout graph.Layout) *graph.Model {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	backend, err := ggml.NewCPU(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	model, err := graph.Load(file, backend, layout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(model.Close)
	return model
}

// adapter makes a LoRA of random weights.
func adapter(t testing.TB, m *graph.Model, o graph.LoRAOptions) *graph.LoRA {
	t.Helper()
	lora, err := m.NewLoRA(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lora.Close)
	random := rand.New(rand.NewPCG(1, 2))
	for _, p := range lora.Parts {
		a, b := make([]float32, o.Rank*p.In), make([]float32, p.Out*o.Rank)
		for _, half := range [][]float32{a, b} {
			for i := range half {
				half[i] = float32(random.NormFloat64() * 0.05)
			}
		}
		lora.SetMatrices(p, a, b)
	}
	return lora
}

// sample is a micro-batch of random rows whose last targets tokens of each are trained.
func sample(vocabulary, targets int, lengths ...int) engine.Batch {
	random := rand.New(rand.NewPCG(3, 4))
	b := engine.Batch{Segments: engine.Rows(lengths...)}
	for _, s := range b.Segments {
		for i := range s.End - s.Start {
			b.Tokens = append(b.Tokens, engine.Token(random.IntN(vocabulary)))
			b.Seeds = append(b.Seeds, random.Uint32())
			if left := s.End - s.Start - i; left <= targets {
				b.Targets = append(b.Targets, engine.Target{Position: s.Start + i, Label: engine.Token(random.IntN(vocabulary)), Weight: 1})
			}
		}
	}
	return b
}

func gradients(t *testing.T, m *graph.Model, lora *graph.LoRA, b engine.Batch) ([]float32, engine.Result) {
	t.Helper()
	clear(lora.Gradients)
	result, err := m.Gradients(b, lora, 1)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Clone(lora.Gradients), result
}

// TestStoredLayouts expects the same numbers from matrices packed at load and from those packed whenever they are used.
func TestStoredLayouts(t *testing.T) {
	for _, path := range testModels(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			var want []float32
			var losses []float32
			for _, layout := range []graph.Layout{{Forward: graph.Packed, Backward: graph.Packed}, {Forward: graph.Stored, Backward: graph.Packed}, {Forward: graph.Packed, Backward: graph.Stored}, {Forward: graph.Stored, Backward: graph.Stored}} {
				m := load(t, path, layout)
				lora := adapter(t, m, graph.LoRAOptions{Rank: 4, Alpha: 8, Dropout: 0.1, Modules: graph.AllLinear})
				got, result := gradients(t, m, lora, sample(m.Vocabulary, 200, 150, 31, 5))
				if want == nil {
					want, losses = got, result.Losses
				}
				if !slices.Equal(want, got) || !slices.Equal(losses, result.Losses) {
					t.Errorf("%s: other gradients or losses than packed at load", layout)
				}
			}
		})
	}
}

// TestPruning compares gradients of a few targets with those of the same and of others of no weight, for which the last
// layer computes every position.
func TestPruning(t *testing.T) {
	for _, path := range testModels(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			for _, modules := range [][]graph.Module{graph.AllLinear, {graph.Query, graph.Value}, {graph.Down}} {
				m := load(t, path, graph.Layout{Forward: ggml.F32, Backward: ggml.F32})
				last := []int{m.Layers - 1}
				for _, layers := range [][]int{nil, last} {
					lora := adapter(t, m, graph.LoRAOptions{Rank: 4, Alpha: 8, Dropout: 0.1, Modules: modules, Layers: layers})
					few := sample(m.Vocabulary, 3, 150, 131, 75, 200)
					all := sample(m.Vocabulary, 1000, 150, 131, 75, 200)
					for i := range all.Targets {
						all.Targets[i].Weight = 0
					}
					for _, target := range few.Targets {
						all.Targets[target.Position] = target
					}
					all.Tokens, all.Seeds = few.Tokens, few.Seeds
					want, wantLosses := gradients(t, m, lora, all)
					got, losses := gradients(t, m, lora, few)
					if e := distance(got, want); !(e < 1e-5) {
						t.Errorf("%v in %v: gradients differ by %g", modules, layers, e)
					}
					for i, target := range few.Targets {
						if math.Abs(float64(losses.Losses[i]-wantLosses.Losses[target.Position])) > 1e-5 {
							t.Errorf("%v: loss %g of target %d, %g with all positions", modules, losses.Losses[i], i, wantLosses.Losses[target.Position])
						}
					}
				}
			}
		})
	}
}

func distance(got, want []float32) float64 {
	var d, n float64
	for i, w := range want {
		d += float64(got[i]-w) * float64(got[i]-w)
		n += float64(w) * float64(w)
	}
	return math.Sqrt(d / n)
}

// TestRecompute expects the same numbers; TestEstimate compares the memory.
func TestRecompute(t *testing.T) {
	for _, path := range testModels(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			for _, modules := range [][]graph.Module{graph.AllLinear, {graph.Query, graph.Value}, {graph.Down}} {
				m := load(t, path, graph.ExactLayout())
				lora := adapter(t, m, graph.LoRAOptions{Rank: 4, Alpha: 8, Dropout: 0.1, Modules: modules})
				b := sample(m.Vocabulary, 20, 150, 131, 75, 200)
				want, losses := gradients(t, m, lora, b)
				again := load(t, path, graph.ExactLayout())
				again.Recompute = true
				lora = adapter(t, again, graph.LoRAOptions{Rank: 4, Alpha: 8, Dropout: 0.1, Modules: modules})
				got, result := gradients(t, again, lora, b)
				if !slices.Equal(want, got) || !slices.Equal(losses.Losses, result.Losses) {
					t.Errorf("%v: other gradients or losses", modules)
				}
			}
		})
	}
}

func TestLayoutNames(t *testing.T) {
	for _, l := range []graph.Layout{graph.ExactLayout(), {Forward: ggml.BF16, Backward: ggml.BF16}, {Forward: graph.Stored, Backward: graph.Packed}, {Forward: ggml.F32, Backward: ggml.F32}} {
		if got, err := graph.ParseLayout(l.String()); err != nil || got != l {
			t.Errorf("ParseLayout(%q) = %v, %v", l, got, err)
		}
	}
	for _, name := range graph.LayoutNames {
		for _, gpu := range []bool{false, true} {
			l, err := graph.LayoutOf(name, gpu)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := graph.ParseLayout(l.String()); err != nil || got != l {
				t.Errorf("%s: ParseLayout(%q) = %v, %v", name, l, got, err)
			}
		}
	}
	if l, err := graph.LayoutOf("small", false); err == nil {
		t.Errorf("LayoutOf(small) = %v", l)
	}
	for _, text := range []string{"", "packed", "packed/", "/packed", "packed/packed/packed", "q3_k/packed"} {
		if l, err := graph.ParseLayout(text); err == nil {
			t.Errorf("ParseLayout(%q) = %v", text, l)
		}
	}
}
