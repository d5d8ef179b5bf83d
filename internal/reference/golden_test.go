package reference_test

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/reference"
)

// golden is what this test reads of the trainer's golden files; the head of scripts/golden/train_golden.py explains them.
type golden struct {
	R         int      `json:"r"`
	LoraAlpha float64  `json:"lora_alpha"`
	RankScale bool     `json:"use_rslora"`
	Targets   []string `json:"target_modules"`
	Layers    []int    `json:"layers_to_transform"`
	Rows      []struct {
		Tokens  []engine.Token `json:"tokens"`
		Weights []float32      `json:"weights"`
	} `json:"rows"`
	Gradient struct {
		Rows   []int   `json:"rows"`
		BBound float64 `json:"b_bound"`
		Loss   float64 `json:"loss"`
	} `json:"gradient"`
}

// goldenUniform is the generator of scripts/golden/lora.py.
func goldenUniform(m reference.Matrix, tensor uint64, bound float64) {
	for i := range len(m) * len(m[0]) {
		z := 1<<48 + tensor<<32 + uint64(i) + 0x9E3779B97F4A7C15
		z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
		z = (z ^ z>>27) * 0x94D049BB133111EB
		z ^= z >> 31
		m[i/len(m[0])][i%len(m[0])] = float64(float32((2*float64(z>>11)/(1<<53) - 1) * bound))
	}
}

// reorder maps rows between Hugging Face's order of rotary heads and that of llama files, where pair i is rows 2i and 2i+1
// of a head instead of i and i + headSize/2.
func reorder(m reference.Matrix, headSize int, toFile bool) reference.Matrix {
	out := make(reference.Matrix, len(m))
	for row := range m {
		i := row % headSize
		other := row - i + i%2*headSize/2 + i/2
		if toFile {
			out[row] = m[other]
		} else {
			out[other] = m[row]
		}
	}
	return out
}

// The gradients are those of transformers and PEFT over the same weights, in float32.
func TestGolden(t *testing.T) {
	for _, name := range []string{"tiny-llama-q4_1", "tiny-llama-q8_0", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join("..", "train", "testdata", name)
			data, err := os.ReadFile(path + ".golden.json")
			if err != nil {
				t.Fatal(err)
			}
			var g golden
			if err := json.Unmarshal(data, &g); err != nil {
				t.Fatal(err)
			}
			list, _, err := gguf.ReadSafetensors(path + ".golden.safetensors")
			if err != nil {
				t.Fatal(err)
			}
			tensors := map[string][]float32{}
			for _, tensor := range list {
				tensors[tensor.Name] = tensor.Data
			}
			file, err := gguf.Open(path + ".gguf")
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			model, err := reference.Load(file)
			if err != nil {
				t.Fatal(err)
			}
			scale := g.LoraAlpha / float64(g.R)
			if g.RankScale {
				scale = g.LoraAlpha / math.Sqrt(float64(g.R))
			}
			sites := slices.DeleteFunc(reference.Sites(model.Layers, reference.Modules...), func(s reference.Site) bool {
				return g.Targets != nil && !slices.Contains(g.Targets, string(s.Module)) || g.Layers != nil && !slices.Contains(g.Layers, s.Layer)
			})
			lora := model.NewLoRA(g.R, scale, sites)
			turned := func(m reference.Module) bool {
				return !model.RopeHalves && (m == reference.Query || m == reference.Key)
			}
			number := func(s reference.Site) uint64 {
				return uint64(s.Layer*len(reference.Modules)+slices.Index(reference.Modules, s.Module)) * 2
			}
			for _, site := range sites {
				pair := lora.Pairs[site]
				goldenUniform(pair.A, number(site), 1/math.Sqrt(float64(len(pair.A[0]))))
				goldenUniform(pair.B, number(site)+1, g.Gradient.BBound)
				if turned(site.Module) {
					pair.B = reorder(pair.B, model.HeadSize, true)
				}
			}
			var b engine.Batch
			total := 0.0
			for _, r := range g.Gradient.Rows {
				row, start := g.Rows[r], len(b.Tokens)
				for i, weight := range row.Weights {
					if i > 0 && weight != 0 {
						b.Targets = append(b.Targets, engine.Target{Position: start + i - 1, Label: row.Tokens[i], Weight: weight})
						total += float64(weight)
					}
				}
				b.Tokens = append(b.Tokens, row.Tokens...)
				b.Segments = append(b.Segments, engine.Segment{Start: start, End: len(b.Tokens), Parent: -1})
			}
			result, err := model.Gradients(b, lora, 1/total)
			if err != nil {
				t.Fatal(err)
			}
			loss := 0.0
			for i, l := range result.Losses {
				loss += float64(l) * float64(b.Targets[i].Weight) / total
			}
			// PyTorch computes in float32.
			if e := math.Abs(loss/g.Gradient.Loss - 1); !(e < 1e-5) {
				t.Errorf("loss %g, PyTorch has %g", loss, g.Gradient.Loss)
			}
			worst := 0.0
			for _, site := range sites {
				pair := lora.Pairs[site]
				if turned(site.Module) {
					pair.GradB = reorder(pair.GradB, model.HeadSize, false)
				}
				block := "self_attn"
				if slices.Contains([]reference.Module{reference.Gate, reference.Up, reference.Down}, site.Module) {
					block = "mlp"
				}
				for i, m := range []reference.Matrix{pair.GradA, pair.GradB} {
					tensor := fmt.Sprintf("layers.%d.%s.%s.lora_%c", site.Layer, block, site.Module, "AB"[i])
					want := tensors["grad."+tensor]
					if len(want) != len(m)*len(m[0]) {
						t.Fatalf("the golden file has %d elements of %s, expected %d", len(want), tensor, len(m)*len(m[0]))
					}
					norm, difference := 0.0, 0.0
					for j, v := range want {
						d := m[j/len(m[0])][j%len(m[0])] - float64(v)
						norm += float64(v) * float64(v)
						difference += d * d
					}
					e := math.Sqrt(difference / norm)
					worst = max(worst, e)
					if !(e < 1e-5) {
						t.Errorf("gradient of %s differs by %.2g", tensor, e)
					}
				}
			}
			t.Logf("gradients of %d matrices differ by at most %.1e", 2*len(sites), worst)
		})
	}
}
