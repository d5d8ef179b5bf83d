package graph

import (
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// openBoth loads a model in float32 with the fused and with the plain blocks, on the CPU, and an adapter on each with
// the same random weights.
func openBoth(t *testing.T, path string, o LoRAOptions) (models [2]*Model, loras [2]*LoRA) {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	for i := range models {
		backend, err := ggml.NewCPU(1)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(backend.Close)
		if models[i], err = Load(file, backend, Layout{ggml.F32, ggml.F32}); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			models[i].blocks = newPlain(backend)
		}
		t.Cleanup(models[i].Close)
		if loras[i], err = models[i].NewLoRA(o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(loras[i].Close)
		random := rand.New(rand.NewPCG(1, 2))
		for _, p := range loras[i].Parts {
			a, b := loras[i].Matrices(loras[i].Parameters, p)
			for j := range a {
				a[j] = float32(random.NormFloat64() * 0.1)
			}
			for j := range b {
				b[j] = float32(random.NormFloat64() * 0.1)
			}
			loras[i].SetMatrices(p, a, b)
		}
	}
	return models, loras
}

// forest is a micro-batch of two trees, of which one shares prefixes over three levels, and a single row, with several
// targets after some positions.
func forest(vocabulary int) engine.Batch {
	random := rand.New(rand.NewPCG(3, 4))
	b := engine.Batch{Segments: []engine.Segment{
		{Start: 0, End: 5, Parent: -1}, {Start: 5, End: 9, Parent: 0}, {Start: 9, End: 11, Parent: 1}, {Start: 11, End: 12, Parent: 1},
		{Start: 12, End: 19, Parent: 0}, {Start: 19, End: 32, Parent: -1}, {Start: 32, End: 34, Parent: -1}, {Start: 34, End: 40, Parent: 6},
		{Start: 40, End: 43, Parent: 6},
	}}
	for i := range 43 {
		b.Tokens = append(b.Tokens, engine.Token(random.IntN(vocabulary)))
		if i%4 == 3 {
			continue
		}
		labels := map[engine.Token]bool{}
		for range 1 + i%3 {
			labels[engine.Token(random.IntN(vocabulary))] = true
		}
		for label := range labels {
			b.Targets = append(b.Targets, engine.Target{Position: i, Label: label, Weight: float32(random.Float64() + 0.1)})
		}
	}
	slices.SortFunc(b.Targets, func(x, y engine.Target) int {
		if x.Position != y.Position {
			return x.Position - y.Position
		}
		return int(x.Label) - int(y.Label)
	})
	return b
}

func distance(a, b []float32) float64 {
	difference, size := 0.0, 0.0
	for i := range a {
		difference += math.Pow(float64(a[i])-float64(b[i]), 2)
		size += math.Pow(float64(a[i]), 2)
	}
	return math.Sqrt(difference / size)
}

// The plain blocks compute what the fused ones do, for every architecture, up to the rounding of float32 sums.
func TestPlainAgreesWithFused(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob("../train/testdata/tiny-*.gguf")
	if err != nil || len(paths) < 5 {
		t.Fatalf("models: %v, %v", paths, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".gguf"), func(t *testing.T) {
			t.Parallel()
			models, loras := openBoth(t, path, LoRAOptions{Rank: 3, Alpha: 6, Modules: AllLinear})
			models[1].blocks.(*plain).composed = strings.Contains(path, "llama") // the others have OutProduct
			batch := forest(models[0].Vocabulary)
			weighed := batch
			weighed.Weigh = func(losses []float32) ([]float32, error) {
				weights := make([]float32, len(losses))
				for i, loss := range losses {
					weights[i] = loss - 3
				}
				return weights, nil
			}
			for name, b := range map[string]engine.Batch{"forest": batch, "weighed": weighed} {
				var results [2]engine.Result
				for i, m := range models {
					clear(loras[i].Gradients)
					for range 2 { // the second adds to the first
						if results[i], err = m.Gradients(b, loras[i], 0.25); err != nil {
							t.Fatal(err)
						}
					}
				}
				if d := distance(results[0].Losses, results[1].Losses); d > 1e-5 {
					t.Errorf("%s: losses differ by %.2g", name, d)
				}
				if !slices.Equal(results[0].Correct, results[1].Correct) {
					t.Errorf("%s: correct: %v and %v", name, results[0].Correct, results[1].Correct)
				}
				for _, p := range loras[0].Parts {
					for i, part := range [][2]int{{p.A, p.In}, {p.B, p.Out}} {
						from, to := part[0], part[0]+loras[0].PaddedRank*part[1]
						if d := distance(loras[0].Gradients[from:to], loras[1].Gradients[from:to]); d > 2e-5 {
							t.Errorf("%s: layer %d, %s, %c: gradients differ by %.2g", name, p.Layer, p.Module, 'A'+i, d)
						}
					}
				}
				a, err := models[0].Logits(b, loras[0])
				if err != nil {
					t.Fatal(err)
				}
				c, err := models[1].Logits(b, loras[1])
				if err != nil {
					t.Fatal(err)
				}
				if d := distance(slices.Concat(a...), slices.Concat(c...)); d > 1e-5 {
					t.Errorf("%s: logits differ by %.2g", name, d)
				}
			}
		})
	}
}

// A correct prediction is reported as one.
func TestPlainCorrect(t *testing.T) {
	t.Parallel()
	models, loras := openBoth(t, "../train/testdata/tiny-llama-q8_0.gguf", LoRAOptions{Rank: 4, Alpha: 4, Modules: AllLinear})
	batch := forest(models[1].Vocabulary)
	logits, err := models[1].Logits(batch, loras[1])
	if err != nil {
		t.Fatal(err)
	}
	var targets []engine.Target
	row := -1
	for i, target := range batch.Targets {
		if i > 0 && batch.Targets[i-1].Position == target.Position {
			continue
		}
		row++
		target.Label = engine.Token(slices.Index(logits[row], slices.Max(logits[row])))
		targets = append(targets, target)
	}
	batch.Targets = targets
	result, err := models[1].Evaluate(batch, loras[1])
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(result.Correct, false) {
		t.Errorf("the most likely labels are not all correct: %v", result.Correct)
	}
}

// With dropout, equal seeds give equal gradients in every packing, other seeds others, and the mean over many seeds is
// the gradient of B without dropout.
func TestPlainDropout(t *testing.T) {
	t.Parallel()
	models, loras := openBoth(t, "../train/testdata/tiny-llama-q8_0.gguf", LoRAOptions{Rank: 4, Alpha: 4, Dropout: 0.3, Modules: []Module{Query, Down}})
	m, l := models[1], loras[1]
	// B is 0, so that dropout changes no activation and its gradient is linear in the masks.
	for _, p := range l.Parts {
		clear(l.Parameters[p.B : p.B+l.PaddedRank*p.Out])
	}
	batch := forest(m.Vocabulary)
	gradient := func(seed uint32, repeat int) []float32 {
		b := batch
		b.Seeds = make([]uint32, len(b.Tokens))
		clear(l.Gradients)
		for i := range repeat {
			for j := range b.Seeds {
				b.Seeds[j] = seed + uint32(i*1000+j)
			}
			if seed == 0 {
				b.Seeds = nil
			}
			if _, err := m.Gradients(b, l, 1/float32(repeat)); err != nil {
				t.Fatal(err)
			}
		}
		return slices.Clone(l.Gradients)
	}
	one := gradient(1, 1)
	if d := distance(one, gradient(1, 1)); d != 0 {
		t.Errorf("equal seeds: gradients differ by %.2g", d)
	}
	if d := distance(one, gradient(100000, 1)); d < 0.1 {
		t.Errorf("other seeds: gradients differ by %.2g only", d)
	}
	whole := gradient(0, 1)
	single := distance(whole, one)
	if d := distance(whole, gradient(7, 100)); d > single/5 {
		t.Errorf("the mean of 100 seeds is off by %.2g, one seed by %.2g", d, single)
	}
}

func TestMasks(t *testing.T) {
	t.Parallel()
	backend, err := ggml.NewCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	p := newPlain(backend)
	defer p.close()
	if err := p.masks.make(backend, 0.1, 96); err != nil {
		t.Fatal(err)
	}
	kept := 0
	for _, v := range p.masks.pool.Floats() {
		switch v {
		case 0:
		case float32(1 / 0.9):
			kept++
		default:
			t.Fatalf("mask of %g", v)
		}
	}
	if share := float64(kept) / (96 * maskPool); math.Abs(share-0.9) > 0.005 {
		t.Errorf("%.4f are kept, expected 0.9", share)
	}
}

// Every query sees the keys of its ancestors and its own segment up to itself, once, and padding sees padding alone.
func TestGroupingCoversForest(t *testing.T) {
	t.Parallel()
	long := []engine.Segment{{Start: 0, End: 100, Parent: -1}}
	for i := range 60 {
		start := long[len(long)-1].End
		long = append(long, engine.Segment{Start: start, End: start + 20 + i*7%50, Parent: 0})
	}
	for name, segments := range map[string][]engine.Segment{
		"forest": forest(10).Segments, "one token": engine.Rows(1), "rows": engine.Rows(3, 50, 7, 7, 120, 1), "shared prefix": long,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const limit = 16
			g := group(segments, limit)
			if g.groups > limit {
				t.Errorf("%d groups, at most %d can be computed", g.groups, limit)
			}
			tokens := segments[len(segments)-1].End
			owner := make([]int, tokens)
			for i, s := range segments {
				for at := s.Start; at < s.End; at++ {
					owner[at] = i
				}
			}
			seen := make([]bool, tokens)
			for q, token := range g.query {
				var sees []int
				for k := range g.keys {
					if g.allowed[q*g.keys+k] {
						sees = append(sees, g.key[q/g.queries*g.keys+k])
					}
				}
				if token < 0 {
					if len(sees) == 0 || slices.Max(sees) >= 0 {
						t.Fatalf("a padded query sees %v", sees)
					}
					continue
				}
				if seen[token] || g.querySlot[token] != q || g.key[g.keySlot[token]] != token {
					t.Fatalf("token %d: twice, or not where it is said to be", token)
				}
				seen[token] = true
				var want []int
				for s, end := owner[token], token+1; s >= 0; {
					for at := segments[s].Start; at < end; at++ {
						want = append(want, at)
					}
					if s = segments[s].Parent; s >= 0 {
						end = segments[s].End
					}
				}
				slices.Sort(want)
				slices.Sort(sees)
				if !slices.Equal(want, sees) {
					t.Fatalf("token %d sees %v, expected %v", token, sees, want)
				}
			}
			if slices.Contains(seen, false) {
				t.Errorf("tokens that no group computes")
			}
			t.Logf("%d tokens: %d groups of %d x %d, %.2f of the square", tokens, g.groups, g.queries, g.keys,
				float64(g.groups*g.queries*g.keys)/float64(tokens*tokens))
		})
	}
}

// supported are the operations that the CUDA, ROCm (the same sources), Vulkan and Metal backends of the linked ggml have
// for the types and shapes of the plain graph. Metal lacks four of them; each is to be composed there: see
// docs/gpu.md.
var supported = map[string]string{
	"GET_ROWS": "all", "SET_ROWS": "all", "MUL_MAT": "all", "ADD": "all", "SUB": "all", "MUL": "all", "SCALE": "all",
	"LOG": "all", "CLAMP": "all", "CONCAT": "all", "CPY": "all", "CONT": "all", "ARGMAX": "all", "SOFT_MAX": "all",
	"RMS_NORM": "all", "SWIGLU": "all", "ROPE": "all", "VIEW": "all", "RESHAPE": "all", "PERMUTE": "all", "TRANSPOSE": "all",
	"NONE":      "all",
	"OUT_PROD":  "cuda rocm", // of MUL_MAT and CONT elsewhere
	"ROPE_BACK": "cuda rocm vulkan", "RMS_NORM_BACK": "cuda rocm vulkan", "SOFT_MAX_BACK": "cuda rocm vulkan", "SILU_BACK": "cuda rocm vulkan",
}

func TestPlainOperationsAreSupported(t *testing.T) {
	t.Parallel()
	models, loras := openBoth(t, "../train/testdata/tiny-qwen2.gguf", LoRAOptions{Rank: 4, Alpha: 4, Dropout: 0.1, Modules: AllLinear})
	batch := forest(models[1].Vocabulary)
	batch.Seeds = make([]uint32, len(batch.Tokens))
	for _, composed := range []bool{false, true} {
		models[1].blocks.(*plain).composed = composed
		count := map[string]int{}
		models[1].inspect = func(g *ggml.Graph) {
			for _, name := range g.Operations() {
				count[name]++
			}
		}
		if _, err := models[1].Gradients(batch, loras[1], 1); err != nil {
			t.Fatal(err)
		}
		for name, n := range count {
			if supported[name] == "" || composed && !strings.Contains(supported[name], "vulkan") && supported[name] != "all" {
				t.Errorf("%d nodes of operation %s, which is not in the table, or not for devices without OUT_PROD", n, name)
			}
		}
		if count["MUL_MAT"] == 0 {
			t.Error("no graph was seen")
		}
		t.Log(fmt.Sprint(count))
	}
}
