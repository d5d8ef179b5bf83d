package runner

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/gguf"
)

// mutant damages a GGUF file in one way of many: cut off, bytes of the header changed, numbers of the header made extreme, or
// weights that are no numbers.
func mutant(random *rand.Rand, file []byte, header int) (changed []byte, how string) {
	changed = slices.Clone(file)
	extremes := []uint64{0, 1, 1 << 31, 1<<32 - 1, 1 << 62, 1<<63 - 1, 1 << 63, 1<<64 - 1, uint64(len(file)), uint64(len(file)) + 1}
	switch kind := random.IntN(6); kind {
	case 0:
		size := random.IntN(len(file) / 4096 * 4096)
		return changed[:size], fmt.Sprintf("cut off at %d", size)
	case 1: // the first counts
		at := 4 + 4*random.IntN(5)
		binary.LittleEndian.PutUint32(changed[at:], uint32(extremes[random.IntN(len(extremes))])) //nolint:gosec // cut off on purpose
		return changed, fmt.Sprintf("byte %d", at)
	case 2, 3:
		at := random.IntN(header - 8)
		for i := range 1 + random.IntN(4) {
			changed[at+i] = byte(random.Uint32()) //nolint:gosec // any byte
		}
		return changed, fmt.Sprintf("bytes from %d", at)
	case 4: // of the tensors' part, at the header's end
		at := max(24, header-8-random.IntN(min(header-32, 2048)))
		binary.LittleEndian.PutUint64(changed[at:], extremes[random.IntN(len(extremes))])
		return changed, fmt.Sprintf("number at %d", at)
	default:
		at := header + random.IntN(len(file)-header-64)
		copy(changed[at:], bytes.Repeat([]byte{0xff}, 64)) // NaN in F32, F16 and BF16
		return changed, fmt.Sprintf("weights at %d", at)
	}
}

// headerBytes is where the weights of a GGUF file begin.
func headerBytes(t *testing.T, path string) int {
	t.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first := f.Size
	for _, tensor := range f.Tensors {
		first = min(first, tensor.Offset)
	}
	return int(first)
}

// says is a child's greedy answer to one of the prompts of series.
func says(t *testing.T, r *child.Runner, a *child.Adapter) (string, error) {
	t.Helper()
	var text strings.Builder
	for e, err := range r.Generate(t.Context(), child.GenerateRequest{Prompt: &series[0], MaxTokens: 8, TopP: 1, Adapter: a}) {
		if err != nil {
			return text.String(), err
		}
		text.WriteString(e.Text)
	}
	return text.String(), nil
}

// Damaged files are refused with a sentence before the engine sees them, or harmless: no runner dies, and the base model
// says what it said before.
func TestDamagedFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("starts 200 runners")
	}
	const seed = 20261123
	random := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // repeatable
	config := child.RunnerConfig{ContextTokens: 128, Sequences: 1, Threads: 1, Device: "cpu"}
	config.ModelDir = modelDir(t)
	base, err := startChild(t, config)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	want, err := says(t, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	pid := base.PID()
	unchanged := func(after string) {
		t.Helper()
		if got, err := says(t, base, nil); err != nil || got != want || base.PID() != pid {
			t.Fatalf("seed %d: after %s the base model says %q, %v; before it said %q", seed, after, got, err, want)
		}
	}

	path := randomAdapter(t, 9)
	adapter, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	header, refused := headerBytes(t, path), 0
	for i := range 60 {
		changed, how := mutant(random, adapter, header)
		path := filepath.Join(t.TempDir(), "adapter.gguf")
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := says(t, base, &child.Adapter{ID: fmt.Sprintf("m%d", i), Path: path})
		refusal := new(child.Error)
		switch {
		case errors.As(err, &refusal) && refusal.Code == child.CodeInvalidAdapter && refusal.Message != "":
			refused++
		case err != nil:
			t.Errorf("seed %d: adapter %d, %s: %v", seed, i, how, err)
		}
		unchanged("an adapter with " + how)
	}
	t.Logf("seed %d: %d of 60 adapters refused", seed, refused)

	path = filepath.Join("..", "train", "testdata", "tiny-llama-q4_1.gguf")
	model, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	header, refused = headerBytes(t, path), 0
	answered := 0
	for i := range 201 {
		changed, how := model, "nothing"
		if i > 0 {
			changed, how = mutant(random, model, header)
		}
		config.ModelDir = t.TempDir()
		if err := os.WriteFile(filepath.Join(config.ModelDir, "base.gguf"), changed, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := startChild(t, config)
		if err == nil {
			if _, err = says(t, r, nil); err == nil {
				answered++
			}
			r.Close()
		} else {
			refused++
		}
		if i == 0 && err != nil {
			t.Fatalf("the whole model: %v", err)
		}
		if refusal := new(child.Error); err != nil && (!errors.As(err, &refusal) || refusal.Message == "") {
			t.Errorf("seed %d: model %d, %s: %v", seed, i, how, err)
		}
		if i%20 == 0 {
			unchanged("20 models, the last with " + how)
		}
	}
	t.Logf("seed %d: %d of 200 models refused, %d answered", seed, refused, answered-1)
}
