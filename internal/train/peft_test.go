//go:build peft

package train

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/modeltest"
)

// TestPEFTLoadsExportedAdapter exports a random adapter of all modules and compares the logits that PEFT computes from
// the exported directory, over the dequantised base in float32, with the trainer's. $HONE_PYTHON is a Python with
// scripts/golden/requirements.txt.
func TestPEFTLoadsExportedAdapter(t *testing.T) {
	python := os.Getenv("HONE_PYTHON")
	if python == "" {
		t.Fatal("HONE_PYTHON is not set: run make test-peft")
	}
	for name, path := range map[string]string{"tiny": "testdata/tiny-llama-q4_1.gguf", "default model": modeltest.Path(t)} {
		t.Run(name, func(t *testing.T) {
			_, model := loadModel(t, path, graph.ExactLayout(), 2)
			adapter, exported := randomAdapter(t, model)
			random := rand.New(rand.NewPCG(12, 13))
			dir := t.TempDir()
			var tokens []engine.Token
			b := engine.Batch{Segments: engine.Rows(40)}
			for i := range 40 {
				tokens = append(tokens, engine.Token(random.IntN(model.Vocabulary)))
				b.Targets = append(b.Targets, engine.Target{Position: i, Weight: 1})
			}
			b.Tokens = tokens
			ours, err := model.Logits(b, adapter)
			if err != nil {
				t.Fatal(err)
			}
			base, err := model.Logits(b, nil)
			if err != nil {
				t.Fatal(err)
			}

			rows, err := json.Marshal([][]engine.Token{tokens})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "tokens.json"), rows, 0o600); err != nil {
				t.Fatal(err)
			}
			absolute, err := filepath.Abs(path)
			if err != nil {
				t.Fatal(err)
			}
			out := filepath.Join(dir, "logits.f32")
			script := exec.CommandContext(t.Context(), python, "../../scripts/golden/peft_check.py", absolute, exported, filepath.Join(dir, "tokens.json"), out)
			if text, err := script.CombinedOutput(); err != nil {
				t.Fatalf("peft_check.py: %v\n%s", err, text)
			}
			data, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if len(data) != 4*len(tokens)*model.Vocabulary {
				t.Fatalf("%d bytes of logits, expected %d", len(data), 4*len(tokens)*model.Vocabulary)
			}
			worst, moved := 0.0, 0.0
			for i := range ours {
				theirs := make([]float32, model.Vocabulary)
				for j := range theirs {
					theirs[j] = math.Float32frombits(binary.LittleEndian.Uint32(data[4*(i*model.Vocabulary+j):]))
				}
				worst = max(worst, maxDifference(t, ours[i], theirs))
				moved = max(moved, maxDifference(t, ours[i], base[i]))
			}
			t.Logf("largest difference of a logit from PEFT's: %.2g; the adapter moves logits by up to %.2f", worst, moved)
			if worst > 2e-3 || moved < 0.5 { // float32 sums in another order
				t.Errorf("logits differ from PEFT's by up to %g; the adapter moves them by up to %g", worst, moved)
			}
		})
	}
}
