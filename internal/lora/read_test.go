package lora

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/gguf"
)

// tinyBase is the header of the base model of testdata/peft: width 16, 4 heads and 2 key-value heads of 4, 12 inner.
func tinyBase(t testing.TB, architecture string) *gguf.File {
	t.Helper()
	metadata := []gguf.KeyValue{
		{Key: "general.architecture", Value: architecture},
		{Key: architecture + ".block_count", Value: uint32(2)},
		{Key: architecture + ".attention.head_count", Value: uint32(4)},
		{Key: architecture + ".attention.head_count_kv", Value: uint32(2)},
	}
	sizes := map[string][2]int64{"attn_q": {16, 16}, "attn_k": {16, 8}, "attn_v": {16, 8}, "attn_output": {16, 16},
		"ffn_gate": {16, 12}, "ffn_up": {16, 12}, "ffn_down": {12, 16}}
	var tensors []gguf.TensorData
	for layer := range 2 {
		for _, name := range slices.Sorted(maps.Keys(sizes)) {
			n := sizes[name]
			tensors = append(tensors, gguf.TensorData{Name: fmt.Sprintf("blk.%d.%s.weight", layer, name), Shape: n[:], Type: gguf.F32, Data: make([]byte, 4*n[0]*n[1])})
		}
	}
	path := filepath.Join(t.TempDir(), "base.gguf")
	if err := gguf.WriteFile(path, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestRead reads each form of the adapter of testdata/peft and expects the rows of the base's file.
func TestRead(t *testing.T) {
	t.Parallel()
	base := tinyBase(t, "llama")
	want := goldenWeights(t)
	slices.Reverse(want.Modules)
	ours := filepath.Join(t.TempDir(), "ours")
	if err := Export(ours, want); err != nil {
		t.Fatal(err)
	}
	alone := t.TempDir()
	if err := os.Link(filepath.Join(ours, GGUFFile), filepath.Join(alone, GGUFFile)); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{"PEFT's": "testdata/peft", "ours": ours, "GGUF alone": alone} {
		got, err := Read(dir, base)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got.Manifest.Rank != 3 || got.Manifest.Alpha != 5 || got.Heads != 4 || got.KVHeads != 2 || got.Architecture != "llama" || got.LayersToTransform != nil {
			t.Errorf("%s: read as %+v", name, got.Manifest)
		}
		if diff := cmp.Diff(want.Modules, got.Modules); diff != "" {
			t.Errorf("%s: modules (-want +got):\n%s", name, diff)
		}
		if diff := cmp.Diff(want.targets(), got.Manifest.TargetModules); diff != "" {
			t.Errorf("%s: targets (-want +got):\n%s", name, diff)
		}
		if id := got.Manifest.BaseDigest; (id != "") != (name == "ours") {
			t.Errorf("%s: base digest %q", name, id)
		}
	}
}

// TestReadQwen expects the rows as PEFT stores them: the files of these architectures do not permute them.
func TestReadQwen(t *testing.T) {
	t.Parallel()
	stored, _, err := gguf.ReadSafetensors("testdata/peft/adapter_model.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	for _, architecture := range []string{"qwen2", "qwen3"} {
		base := tinyBase(t, architecture)
		got, err := Read("testdata/peft", base)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(stored, func(x gguf.Float32Tensor) bool {
			return x.Name == "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
		})
		if diff := cmp.Diff(stored[i].Data, got.Modules[0].B); diff != "" {
			t.Errorf("%s: B of q (-want +got):\n%s", architecture, diff)
		}
		got.Manifest.ID, got.Manifest.Name, got.Manifest.BaseModel = "abc", "ft:tiny:local:test:abc", "tiny"
		got.Manifest.BaseDigest = strings.Repeat("0", 64)
		dir := filepath.Join(t.TempDir(), "abc")
		if err := Export(dir, got); err != nil {
			t.Fatal(err)
		}
		f, err := gguf.Open(filepath.Join(dir, GGUFFile))
		if err != nil {
			t.Fatal(err)
		}
		if err := gguf.CheckAdapter(f, base); err != nil {
			t.Errorf("%s: %v", architecture, err)
		}
		f.Close()
		again, _, err := gguf.ReadSafetensors(filepath.Join(dir, PEFTWeights))
		if err != nil {
			t.Fatal(err)
		}
		byName := func(a, b gguf.Float32Tensor) int { return strings.Compare(a.Name, b.Name) }
		slices.SortFunc(stored, byName)
		slices.SortFunc(again, byName)
		if diff := cmp.Diff(stored, again); diff != "" {
			t.Errorf("%s: what was read and exported (-want +got):\n%s", architecture, diff)
		}
	}
}

// peftDir writes an adapter of q and v in the given layers as PEFT would, with changes to its configuration. Numbers
// are stored in the type of dtype.
func peftDir(t *testing.T, dtype string, layers []int, config map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	fields := map[string]any{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": []string{"q_proj", "v_proj"}, "bias": "none"}
	maps.Copy(fields, config)
	if err := writeJSON(filepath.Join(dir, PEFTConfig), fields); err != nil {
		t.Fatal(err)
	}
	header := map[string]any{"__metadata__": map[string]string{"format": "pt"}}
	var data []byte
	add := func(name string, rows, columns int) {
		begin := len(data)
		for i := range rows * columns {
			x := float32(i%7) - 3 // exact in every type
			switch bits := math.Float32bits(x); dtype {
			case "F32":
				data = binary.LittleEndian.AppendUint32(data, bits)
			case "BF16":
				data = binary.LittleEndian.AppendUint16(data, uint16(bits>>16))
			case "F16":
				h := uint16(0)
				if x != 0 {
					h = uint16(bits>>16&0x8000 | ((bits>>23&0xff)-112)<<10 | bits>>13&0x3ff)
				}
				data = binary.LittleEndian.AppendUint16(data, h)
			}
		}
		header[name] = map[string]any{"dtype": dtype, "shape": []int{rows, columns}, "data_offsets": []int{begin, len(data)}}
	}
	for _, layer := range layers {
		for name, out := range map[string]int{"q_proj": 16, "v_proj": 8} {
			prefix := fmt.Sprintf("base_model.model.model.layers.%d.self_attn.%s", layer, name)
			add(prefix+".lora_A.weight", 2, 16)
			add(prefix+".lora_B.weight", out, 2)
		}
	}
	head, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(head))), head...)
	if err := os.WriteFile(filepath.Join(dir, PEFTWeights), append(file, data...), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestReadPEFTOptions(t *testing.T) {
	t.Parallel()
	base := tinyBase(t, "llama")
	for _, dtype := range []string{"F32", "F16", "BF16"} {
		w, err := Read(peftDir(t, dtype, []int{1}, map[string]any{"use_rslora": true, "target_modules": `.*\.layers\.1\.self_attn\.(q|v)_proj`}), base)
		if err != nil {
			t.Fatalf("%s: %v", dtype, err)
		}
		if !w.UseRSLoRA || w.Dropout != 0.1 || w.Manifest.Alpha != 4 || !slices.Equal(w.LayersToTransform, []int{1}) ||
			!slices.Equal(w.Manifest.TargetModules, []string{"q_proj", "v_proj"}) || len(w.Modules) != 2 {
			t.Errorf("%s: %+v", dtype, w.Manifest)
		}
		for i := range w.Modules[1].B { // v is not permuted
			if want := float32(i%7) - 3; w.Modules[1].B[i] != want {
				t.Fatalf("%s: B of v [%d] = %v, want %v", dtype, i, w.Modules[1].B[i], want)
			}
		}
	}
	w, err := Read(peftDir(t, "F32", []int{1}, nil), base)
	if err != nil {
		t.Fatal(err)
	}
	w.Manifest = Manifest{ID: "abc", Name: "ft:tiny:local:test:abc", BaseModel: "tiny", BaseDigest: strings.Repeat("0", 64), Rank: 2, Alpha: 4}
	dir := filepath.Join(t.TempDir(), "abc")
	if err := Export(dir, w); err != nil {
		t.Fatal(err)
	}
	var exported struct {
		Layers []int `json:"layers_to_transform"`
	}
	if readJSON(t, filepath.Join(dir, PEFTConfig), &exported); !slices.Equal(exported.Layers, []int{1}) {
		t.Errorf("exported layers_to_transform %v, want [1]", exported.Layers)
	}
	if w, err := Read(peftDir(t, "F32", []int{0, 1}, map[string]any{"target_modules": "all-linear"}), base); err != nil || w.LayersToTransform != nil {
		t.Errorf("all-linear: %v, layers %v", err, w.LayersToTransform)
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	base := tinyBase(t, "llama")
	config := func(key string, value any) string { return peftDir(t, "F32", []int{0, 1}, map[string]any{key: value}) }
	changed := filepath.Join(t.TempDir(), "changed")
	if err := Export(changed, goldenWeights(t)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(changed, GGUFFile), []byte("other"), 0o644); err != nil {
		t.Fatal(err)
	}
	bin := config("r", 2)
	if err := os.Rename(filepath.Join(bin, PEFTWeights), filepath.Join(bin, "adapter_model.bin")); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		config("rank_pattern", map[string]int{"q_proj": 8}):  "rank_pattern",
		config("alpha_pattern", map[string]int{"q_proj": 8}): "alpha_pattern",
		config("use_dora", true):                             "use_dora",
		config("bias", "all"):                                "bias",
		config("modules_to_save", []string{"lm_head"}):       "modules_to_save",
		config("init_lora_weights", "pissa"):                 "init_lora_weights",
		config("peft_type", "IA3"):                           "peft_type",
		config("r", 0):                                       "r is 0",
		config("r", 4):                                       "expected the rank 4",
		peftDir(t, "F32", []int{0, 2}, nil):                  "has no blk.2.attn_q.weight",
		changed:                                              "the file was changed",
		bin:                                                  "safe_serialization",
		t.TempDir():                                          "neither adapter_config.json nor adapter.gguf",
	} {
		if _, err := Read(dir, base); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want an error with %q", err, want)
		}
	}
	if _, err := Read("testdata/peft", tinyWide(t)); err == nil || !strings.Contains(err.Error(), "another model") {
		t.Errorf("%v, want an error about another model", err)
	}
}

// tinyWide is a base model whose only adapted weight is wider than testdata/peft's.
func tinyWide(t *testing.T) *gguf.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wide.gguf")
	err := gguf.WriteFile(path, []gguf.KeyValue{{Key: "general.architecture", Value: "qwen2"}},
		[]gguf.TensorData{{Name: "blk.0.attn_q.weight", Shape: []int64{32, 16}, Type: gguf.F32, Data: make([]byte, 4*32*16)}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
