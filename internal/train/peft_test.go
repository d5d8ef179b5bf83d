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
			_, model := loadModel(t, path, float32s, 2)
			adapter, exported := randomAdapter(t, model)
			random := rand.New(rand.NewPCG(12, 13))
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

			theirs := peftLogits(t, python, path, exported, [][]engine.Token{tokens}, model.Vocabulary)
			worst, moved := 0.0, 0.0
			for i := range ours {
				worst = max(worst, maxDifference(t, ours[i], theirs[i]))
				moved = max(moved, maxDifference(t, ours[i], base[i]))
			}
			t.Logf("largest difference of a logit from PEFT's: %.2g; the adapter moves logits by up to %.2f", worst, moved)
			if worst > 2e-3 || moved < 0.5 { // float32 sums in another order
				t.Errorf("logits differ from PEFT's by up to %g; the adapter moves them by up to %g", worst, moved)
			}
		})
	}
}

// TestPEFTReadsGoldenAdapters exports the adapter of every tiny model's golden file, whose logits PEFT computed with the
// adapter in memory: from the exported directory it must compute the same. Targets, layers, rsLoRA and the order of rows are in
// the files then as they were meant.
func TestPEFTReadsGoldenAdapters(t *testing.T) {
	python := os.Getenv("HONE_PYTHON")
	if python == "" {
		t.Fatal("HONE_PYTHON is not set: run make test-peft")
	}
	for _, m := range tinyModels {
		t.Run(m.name, func(t *testing.T) {
			path := "testdata/" + m.name + ".gguf"
			run := loadGolden(t, readGolden(t, m.name), path, float32s, 1)
			run.initialise(run.Gradient.BBound)
			var rows [][]engine.Token
			for _, r := range run.Gradient.Rows {
				rows = append(rows, run.Rows[r].Tokens)
			}
			vocabulary := run.model.Vocabulary
			theirs := peftLogits(t, python, path, run.export(t, path), rows, vocabulary)
			last, worst := -1, 0.0
			for i, row := range rows {
				last += len(row)
				worst = max(worst, distance(theirs[last], run.tensors["logits"].Data[i*vocabulary:(i+1)*vocabulary]))
			}
			t.Logf("%s: relative error of a row of logits at most %.3g", m.what, worst)
			if !(worst < 1e-5) {
				t.Error("PEFT reads another adapter than the golden one")
			}
		})
	}
}

// peftLogits are the logits of PEFT over an exported adapter at every position of every row.
func peftLogits(t *testing.T, python, base, adapter string, rows [][]engine.Token, vocabulary int) [][]float32 {
	t.Helper()
	dir := t.TempDir()
	text, err := json.Marshal(rows)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tokens.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	absolute, err := filepath.Abs(base)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "logits.f32")
	script := exec.CommandContext(t.Context(), python, "../../scripts/golden/peft_check.py", absolute, adapter, filepath.Join(dir, "tokens.json"), out)
	if text, err := script.CombinedOutput(); err != nil {
		t.Fatalf("peft_check.py: %v\n%s", err, text)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	positions := 0
	for _, row := range rows {
		positions += len(row)
	}
	if len(data) != 4*positions*vocabulary {
		t.Fatalf("%d bytes of logits, expected %d", len(data), 4*positions*vocabulary)
	}
	logits := make([][]float32, positions)
	for i := range logits {
		for range vocabulary {
			logits[i] = append(logits[i], math.Float32frombits(binary.LittleEndian.Uint32(data)))
			data = data[4:]
		}
	}
	return logits
}
