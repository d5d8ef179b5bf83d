package lora

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/gguf"
)

// goldenWeights are the weights of testdata/peft as a trainer would hand them over.
func goldenWeights(t testing.TB) Weights {
	t.Helper()
	tensors, _, err := gguf.ReadSafetensors("testdata/peft/gguf_order.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	w := Weights{
		Manifest: Manifest{ID: "abc123", Name: "ft:tiny:local:test:abc123", BaseModel: "tiny",
			BaseDigest: strings.Repeat("0", 64), Rank: 3, Alpha: 5, MaxLength: 64},
		Architecture: "llama", Dropout: 0.05, Heads: 4, KVHeads: 2,
	}
	for layer := range 2 {
		for _, p := range projections {
			m := Module{Layer: layer, Name: p.name}
			for _, x := range tensors {
				prefix := "base_model.model.model.layers." + string(rune('0'+layer)) + "." + p.path
				switch x.Name {
				case prefix + ".lora_A.weight":
					m.A, m.In = x.Data, int(x.Shape[1])
				case prefix + ".lora_B.weight":
					m.B, m.Out = x.Data, int(x.Shape[0])
				}
			}
			w.Modules = append(w.Modules, m)
		}
	}
	slices.Reverse(w.Modules) // Export sorts
	return w
}

// TestExportLikePEFT compares with the files that PEFT itself wrote for the same adapter.
func TestExportLikePEFT(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "adapters", "abc123")
	if err := Export(dir, goldenWeights(t)); err != nil {
		t.Fatal(err)
	}
	got, metadata, err := gguf.ReadSafetensors(filepath.Join(dir, PEFTWeights))
	if err != nil {
		t.Fatal(err)
	}
	want, wantMetadata, err := gguf.ReadSafetensors("testdata/peft/adapter_model.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	byName := func(a, b gguf.Float32Tensor) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(got, byName)
	slices.SortFunc(want, byName)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tensors (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(wantMetadata, metadata); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}

	var gotConfig, wantConfig map[string]any
	readJSON(t, filepath.Join(dir, PEFTConfig), &gotConfig)
	readJSON(t, "testdata/peft/adapter_config.json", &wantConfig)
	for key, value := range gotConfig {
		wantValue, known := wantConfig[key]
		if diff := cmp.Diff(wantValue, value); diff != "" || !known {
			t.Errorf("%s %s: known to PEFT: %v (-want +got):\n%s", PEFTConfig, key, known, diff)
		}
	}
}

func readJSON(t testing.TB, path string, v any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}

func TestExport(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	dir := filepath.Join(parent, "abc123")
	w := goldenWeights(t)
	// What an earlier attempt left is replaced.
	if err := os.MkdirAll(filepath.Join(dir, "old"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Export(dir, w); err != nil {
		t.Fatal(err)
	}

	m, err := ReadManifest(dir)
	if err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 || len(m.Files) != 3 {
		t.Errorf("%d files, %d in the manifest; want 4, 3", len(files), len(m.Files))
	}
	for name, digest := range m.Files {
		if got, err := durable.Digest(filepath.Join(dir, name)); err != nil || got != digest {
			t.Errorf("%s has sha256 %s (%v), the manifest says %s", name, got, err, digest)
		}
	}
	want := []string{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
	if m.Alpha != 5 || !slices.Equal(m.TargetModules, want) {
		t.Errorf("manifest has alpha %v and modules %v, want 5 and %v", m.Alpha, m.TargetModules, want)
	}

	f, err := gguf.Open(filepath.Join(dir, GGUFFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := gguf.CheckAdapter(f, nil); err != nil {
		t.Error(err)
	}
	if alpha, _ := f.Metadata.Float("adapter.lora.alpha"); alpha != 5 {
		t.Errorf("adapter.lora.alpha = %v, want 5", alpha)
	}
	var names []string
	for _, x := range f.Tensors {
		if strings.HasPrefix(x.Name, "blk.1.") {
			names = append(names, x.Name)
		}
	}
	var wantNames []string
	for _, p := range []string{"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"} {
		wantNames = append(wantNames, "blk.1."+p+".weight.lora_a", "blk.1."+p+".weight.lora_b")
	}
	if diff := cmp.Diff(wantNames, names); diff != "" {
		t.Errorf("tensors of layer 1 (-want +got):\n%s", diff)
	}
	b, _ := f.Tensor("blk.0.attn_k.weight.lora_b")
	for _, module := range w.Modules {
		if module.Layer == 0 && module.Name == "k_proj" {
			if !slices.Equal(b.Shape, []int64{3, 8}) || !slices.Equal(f.Data(b), gguf.Float32Bytes(module.B)) {
				t.Errorf("lora_b of k has shape %v or other weights than it was given", b.Shape)
			}
		}
	}
	if left, _ := os.ReadDir(parent); len(left) != 1 {
		t.Errorf("temporary files are left: %v", left)
	}
}

func TestExportRSLoRA(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "abc123")
	w := goldenWeights(t)
	w.UseRSLoRA = true
	if err := Export(dir, w); err != nil {
		t.Fatal(err)
	}
	m, err := ReadManifest(dir)
	if err != nil {
		t.Fatal(err)
	}
	f, err := gguf.Open(filepath.Join(dir, GGUFFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	alpha, _ := f.Metadata.Float("adapter.lora.alpha")
	want := 5 / math.Sqrt(3) // the scale, alpha/sqrt(r)
	if math.Abs(alpha/3-want) > 1e-6 || math.Abs(m.Alpha/3-want) > 1e-6 {
		t.Errorf("scales of adapter.gguf and manifest are %v and %v, want %v", alpha/3, m.Alpha/3, want)
	}
	var config peftConfig
	readJSON(t, filepath.Join(dir, PEFTConfig), &config)
	if !config.UseRSLoRA || config.LoRAAlpha != 5 {
		t.Errorf("PEFT's configuration has use_rslora %v, lora_alpha %v; want true, 5", config.UseRSLoRA, config.LoRAAlpha)
	}
}

// TestExportOtherArchitecture: without the converter's permutation both copies have the same rows.
func TestExportOtherArchitecture(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "abc123")
	w := goldenWeights(t)
	w.Architecture = "qwen2"
	if err := Export(dir, w); err != nil {
		t.Fatal(err)
	}
	got, _, err := gguf.ReadSafetensors(filepath.Join(dir, PEFTWeights))
	if err != nil {
		t.Fatal(err)
	}
	want, _, err := gguf.ReadSafetensors("testdata/peft/gguf_order.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	byName := func(a, b gguf.Float32Tensor) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(got, byName)
	slices.SortFunc(want, byName)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tensors (-want +got):\n%s", diff)
	}
}

func TestExportRefuses(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*Weights)
		want   string
	}{
		"NaN":          {func(w *Weights) { w.Modules[3].B[1] = float32(math.NaN()) }, "diverged"},
		"infinite":     {func(w *Weights) { w.Modules[0].A[0] = float32(math.Inf(-1)) }, "diverged"},
		"short":        {func(w *Weights) { w.Modules[0].A = w.Modules[0].A[1:] }, "elements"},
		"twice":        {func(w *Weights) { w.Modules[0] = w.Modules[1] }, "twice"},
		"unknown":      {func(w *Weights) { w.Modules[0].Name = "lm_head" }, "no module"},
		"none":         {func(w *Weights) { w.Modules = nil }, "no modules"},
		"rank":         {func(w *Weights) { w.Manifest.Rank = 0 }, "rank"},
		"alpha":        {func(w *Weights) { w.Manifest.Alpha = 0 }, "alpha"},
		"heads":        {func(w *Weights) { w.Heads = 5 }, "heads"},
		"no name":      {func(w *Weights) { w.Manifest.Name = "tiny" }, "name"},
		"base missing": {func(w *Weights) { w.Manifest.BaseDigest = "" }, "base_digest"},
	} {
		parent := t.TempDir()
		w := goldenWeights(t)
		tt.change(&w)
		if err := Export(filepath.Join(parent, "abc123"), w); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", name, err, tt.want)
		}
		if left, _ := os.ReadDir(parent); len(left) != 0 {
			t.Errorf("%s: files are left: %v", name, left)
		}
	}
}

func TestRowsRoundTrip(t *testing.T) {
	t.Parallel()
	b := make([]float32, 4*6*2) // 4 heads of 6 rows, rank 2
	for i := range b {
		b[i] = float32(i)
	}
	gguf := GGUFRows(b, 4, 2)
	// Row 1 of the GGUF is row d/2 = 3 of Hugging Face's first head.
	if gguf[2] != b[3*2] || gguf[3] != b[3*2+1] {
		t.Errorf("row 1 is %v, want row 3 of %v", gguf[2:4], b)
	}
	if diff := cmp.Diff(b, HuggingFaceRows(gguf, 4, 2)); diff != "" {
		t.Errorf("there and back (-want +got):\n%s", diff)
	}
}
