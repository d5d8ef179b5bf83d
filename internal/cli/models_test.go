package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/modeltest"
)

// hone runs a command line and returns its exit code and what it printed.
func hone(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = Run(ctx, args, strings.NewReader(""), &out, &err)
	return code, out.String(), err.String()
}

func TestModels(t *testing.T) {
	// The cache is linked, not copied, so the test needs little disk.
	file := modeltest.Path(t)
	cache := t.TempDir()
	cached := filepath.Join(cache, "hone", "models", "SmolLM2-135M-Instruct.Q4_1.gguf")
	if err := os.MkdirAll(filepath.Dir(cached), 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Link(file, cached) != nil {
		if err := os.Symlink(file, cached); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("XDG_CACHE_HOME", cache)
	home := t.TempDir()
	t.Setenv("HONE_HOME", home)
	t.Setenv("HF_ENDPOINT", "http://127.0.0.1:1") // nothing is fetched

	tuned := filepath.Join(home, "adapters", "a1")
	if err := os.MkdirAll(tuned, 0o755); err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(lora.Manifest{ID: "a1", Name: "ft:again:local:quiz:a1", BaseModel: "again", BaseDigest: strings.Repeat("ab", 32), Rank: 1, Alpha: 1,
		TargetModules: []string{"q_proj"}, MaxLength: 2, Files: map[string]string{lora.GGUFFile: strings.Repeat("ab", 32)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tuned, lora.ManifestFile), manifest, 0o600); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken.gguf")
	if err := os.WriteFile(broken, []byte("GGUF\x03\x00\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	// As PEFT saves it: without the manifest and adapter.gguf.
	peft := filepath.Join(t.TempDir(), "mine")
	weights := lora.Weights{
		Manifest:     lora.Manifest{ID: "x", Name: "ft:x:local::x", BaseModel: "x", BaseDigest: strings.Repeat("ab", 32), Rank: 1, Alpha: 2},
		Architecture: "llama", Heads: 9, KVHeads: 3, LayersToTransform: []int{0},
		Modules: []lora.Module{{Layer: 0, Name: "q_proj", In: 576, Out: 576, A: make([]float32, 576), B: make([]float32, 576)}},
	}
	if err := lora.Export(peft, weights); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{lora.ManifestFile, lora.GGUFFile} {
		if err := os.Remove(filepath.Join(peft, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"models list", 0, "no models yet", ""},
		{"pull --cache-only", 0, cached, ""},
		{"models list", 0, "no models yet", ""},
		{"pull", 0, "SmolLM2-135M-Instruct is here: Q4_1, 98 MB", ""},
		{"pull", 0, "SmolLM2-135M-Instruct is here", ""},
		{"pull smollm2-135m-instruct --name again", 0, "again is here", ""},
		{"models list", 0, "b179c9523d0e", ""},
		{"models add-adapter " + peft, 2, "", "base"},
		{"models add-adapter " + peft + " --base none", 1, "", "no such model"},
		{"models add-adapter " + home + " --base again", 1, "", "neither adapter_config.json nor adapter.gguf"},
		{"models add-adapter " + peft + " --base SmolLM2-135M-Instruct --suffix a_b", 0, "ft:SmolLM2-135M-Instruct:local:a_b:", ""},
		{"models rm again", 1, "", "again is the base of 1 tuned model, useless without it: ft:again:local:quiz:a1; delete"},
		{"models rm again --force", 0, "removed again", ""},
		{"models rm again", 1, "", "no such model"},
		{"models add " + broken, 1, "", "number of tensors"},
		{"models add " + file + " --name SmolLM2-135M-Instruct", 1, "", "hone models rm SmolLM2-135M-Instruct"},
		{"models add " + file + " --name ft:x", 1, "", "model name"},
		{"models add " + filepath.Join(home, "gone.gguf"), 1, "", "no such file"},
		{"pull what", 1, "", "owner/repository/file.gguf"},
		{"pull owner/repo/file.gguf", 1, "", "connection refused"},
		{"pull a b", 2, "", "hone pull --help"},
		{"pull --cache-only --name x", 2, "", "exclude each other"},
		{"pull --nonsense", 2, "", "nonsense"},
		{"models add", 2, "", "hone models add --help"},
		{"models dance", 2, "", "dance"},
		{"models", 0, "Available Commands", ""},
	} {
		code, stdout, stderr := hone(t.Context(), strings.Fields(tt.args)...)
		if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) || tt.stderr == "" && stderr != "" {
			t.Errorf("hone %s: exit code %d, want %d\nstdout: %s(want %q)\nstderr: %s(want %q)",
				tt.args, code, tt.code, stdout, tt.stdout, stderr, tt.stderr)
		}
	}

	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if code, _, stderr := hone(cancelled, "models", "add", file, "--name", "stopped"); code != exitInterrupted {
		t.Errorf("cancelled: exit code %d, want %d; %s", code, exitInterrupted, stderr)
	}
	if entries, err := os.ReadDir(filepath.Join(home, "models")); err != nil || len(entries) != 1 {
		t.Errorf("the store holds %v, %v; want the default model only", entries, err)
	}
}
