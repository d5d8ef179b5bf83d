package lora

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/gguf"
)

// Weights is a trained adapter as Export writes it.
type Weights struct {
	// Manifest is written as manifest.json with three fields filled in: Files, TargetModules if it is empty, and Alpha.
	// Here Alpha is PEFT's lora_alpha; what is written is the alpha of Alpha/Rank, which differs with UseRSLoRA.
	Manifest     Manifest
	Architecture string  // general.architecture of the base model
	UseRSLoRA    bool    // the weights are scaled by alpha/sqrt(rank)
	Dropout      float64 // of the training, for PEFT's configuration
	Heads        int     // attention heads of the base model
	KVHeads      int     // of k and v
	Modules      []Module

	LayersToTransform []int // of the training; empty if all layers of the base model are adapted
}

// Module is the LoRA pair of one linear layer: y = W x + scale * B A x.
type Module struct {
	Layer   int
	Name    string // q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
	In, Out int    // columns and rows of the base's weight
	A       []float32
	B       []float32
	// A is [rank][In] and B is [Out][rank], both row-major; the rows of B are in the order of the base GGUF's rows.
}

// projections are the modules that can be adapted, in the order of the computation: their tensor in a block of a GGUF
// file, and their place in a layer of a Hugging Face model.
var projections = []struct{ name, tensor, path string }{
	{"q_proj", "attn_q", "self_attn.q_proj"},
	{"k_proj", "attn_k", "self_attn.k_proj"},
	{"v_proj", "attn_v", "self_attn.v_proj"},
	{"o_proj", "attn_output", "self_attn.o_proj"},
	{"gate_proj", "ffn_gate", "mlp.gate_proj"},
	{"up_proj", "ffn_up", "mlp.up_proj"},
	{"down_proj", "ffn_down", "mlp.down_proj"},
}

func projection(name string) int {
	for i, p := range projections {
		if p.name == name {
			return i
		}
	}
	return -1
}

// Export writes an adapter into the new directory dir, in two forms: adapter.gguf for llama.cpp, and
// adapter_model.safetensors with adapter_config.json for PEFT. manifest.json with the sha256 of each is the last file.
//
// Everything is written and fsynced in a temporary directory beside dir, which is then renamed: dir is complete or does
// not exist. A dir that is there already is what an earlier attempt left, and is replaced.
func Export(dir string, w Weights) (err error) {
	w.Modules = slices.Clone(w.Modules)
	slices.SortFunc(w.Modules, func(a, b Module) int {
		return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(projection(a.Name), projection(b.Name)))
	})
	if err := w.validate(); err != nil {
		return fmt.Errorf("export adapter %q: %w", w.Manifest.ID, err)
	}
	dir = filepath.Clean(dir)
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	temp, err := os.MkdirTemp(parent, ".tmp-adapter-*")
	if err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	defer os.RemoveAll(temp) // after the rename there is nothing left to remove
	if err := os.Chmod(temp, 0o755); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}

	var files errgroup.Group // training waits: at the same time, both forms and the disk take half as long
	files.Go(func() error { return w.writeGGUF(filepath.Join(temp, GGUFFile)) })
	files.Go(func() error { return w.writePEFT(temp) })
	if err := files.Wait(); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	m := w.Manifest
	m.Alpha = w.alpha()
	if len(m.TargetModules) == 0 {
		m.TargetModules = w.targets()
	}
	m.Files = map[string]string{}
	for _, name := range []string{GGUFFile, PEFTWeights, PEFTConfig} {
		if m.Files[name], err = durable.Digest(filepath.Join(temp, name)); err != nil {
			return fmt.Errorf("export adapter: %w", err)
		}
	}
	if err := m.Validate(); err != nil {
		return fmt.Errorf("export adapter: manifest: %w", err)
	}
	if err := writeJSON(filepath.Join(temp, ManifestFile), m); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}

	if err := durable.SyncDir(temp); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	if err := os.Rename(temp, dir); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	if err := durable.SyncDir(parent); err != nil {
		return fmt.Errorf("export adapter: %w", err)
	}
	return nil
}

// alpha is the one that gives the right scale as alpha/rank, which is all that GGUF can say.
func (w *Weights) alpha() float64 {
	if w.UseRSLoRA {
		return w.Manifest.Alpha * math.Sqrt(float64(w.Manifest.Rank))
	}
	return w.Manifest.Alpha
}

// targets are the distinct names of the modules.
func (w *Weights) targets() []string {
	var out []string
	for _, p := range projections {
		if slices.ContainsFunc(w.Modules, func(m Module) bool { return m.Name == p.name }) {
			out = append(out, p.name)
		}
	}
	return out
}

// permuted says whether the base's converter reordered the rows of this projection: it does for rope on neighbouring
// pairs, which only the llama architecture has among those that can be trained.
func (w *Weights) permuted(name string) (heads int, yes bool) {
	if w.Architecture != "llama" {
		return 0, false
	}
	switch name {
	case "q_proj":
		return w.Heads, true
	case "k_proj":
		return w.KVHeads, true
	}
	return 0, false
}

func (w *Weights) validate() error {
	r := w.Manifest.Rank
	if r < 1 {
		return fmt.Errorf("rank is %d, expected 1 or more", r)
	}
	// llama.cpp takes an alpha of 0 for "no scaling".
	if a := w.Manifest.Alpha; !(a > 0) || math.IsInf(a, 0) {
		return fmt.Errorf("alpha is %v, expected a positive number", a)
	}
	if len(w.Modules) == 0 {
		return fmt.Errorf("there are no modules")
	}
	for i, m := range w.Modules {
		what := fmt.Sprintf("layer %d %s", m.Layer, m.Name)
		if projection(m.Name) < 0 || m.Layer < 0 {
			return fmt.Errorf("%s is no module that can be adapted", what)
		}
		if i > 0 && w.Modules[i-1].Layer == m.Layer && w.Modules[i-1].Name == m.Name {
			return fmt.Errorf("%s occurs twice", what)
		}
		if m.In < 1 || m.Out < 1 || len(m.A) != r*m.In || len(m.B) != m.Out*r {
			return fmt.Errorf("%s: A has %d and B %d elements, expected %d x %d and %d x %d",
				what, len(m.A), len(m.B), r, m.In, m.Out, r)
		}
		if heads, yes := w.permuted(m.Name); yes && (heads < 1 || m.Out%(2*heads) != 0) {
			return fmt.Errorf("%s: %d rows are not %d heads of an even size", what, m.Out, heads)
		}
		for _, half := range [][]float32{m.A, m.B} {
			for _, x := range half {
				if x-x != 0 { // infinite or not a number
					return fmt.Errorf("%s has the weight %v: the training diverged", what, x)
				}
			}
		}
	}
	return nil
}

func (w *Weights) writeGGUF(path string) error {
	metadata := []gguf.KeyValue{
		{Key: "general.type", Value: "adapter"},
		{Key: "general.architecture", Value: w.Architecture},
		{Key: "general.name", Value: w.Manifest.Name},
		{Key: "adapter.type", Value: "lora"},
		{Key: "adapter.lora.alpha", Value: float32(w.alpha())},
	}
	r := int64(w.Manifest.Rank)
	var tensors []gguf.TensorData
	for _, m := range w.Modules {
		name := fmt.Sprintf("blk.%d.%s.weight", m.Layer, projections[projection(m.Name)].tensor)
		tensors = append(tensors,
			gguf.TensorData{Name: name + gguf.SuffixA, Shape: []int64{int64(m.In), r}, Type: gguf.F32, Data: gguf.Float32Bytes(m.A)},
			gguf.TensorData{Name: name + gguf.SuffixB, Shape: []int64{r, int64(m.Out)}, Type: gguf.F32, Data: gguf.Float32Bytes(m.B)})
	}
	return gguf.WriteFile(path, metadata, tensors)
}

// peftConfig is adapter_config.json with the fields that PEFT's LoraConfig needs; it takes its defaults for the others.
type peftConfig struct {
	AlphaPattern      map[string]float64 `json:"alpha_pattern"`
	BaseModel         string             `json:"base_model_name_or_path"`
	Bias              string             `json:"bias"`
	FanInFanOut       bool               `json:"fan_in_fan_out"`
	InferenceMode     bool               `json:"inference_mode"`
	InitLoRAWeights   bool               `json:"init_lora_weights"`
	LayersToTransform []int              `json:"layers_to_transform"`
	LoRAAlpha         float64            `json:"lora_alpha"`
	LoRADropout       float64            `json:"lora_dropout"`
	ModulesToSave     []string           `json:"modules_to_save"`
	PEFTType          string             `json:"peft_type"`
	R                 int                `json:"r"`
	RankPattern       map[string]int     `json:"rank_pattern"`
	Revision          *string            `json:"revision"`
	TargetModules     []string           `json:"target_modules"`
	TaskType          string             `json:"task_type"`
	UseDoRA           bool               `json:"use_dora"`
	UseRSLoRA         bool               `json:"use_rslora"`
}

func (w *Weights) writePEFT(dir string) error {
	r := int64(w.Manifest.Rank)
	var tensors []gguf.Float32Tensor
	for _, m := range w.Modules {
		b := m.B
		if heads, yes := w.permuted(m.Name); yes {
			b = HuggingFaceRows(b, heads, w.Manifest.Rank)
		}
		name := fmt.Sprintf("base_model.model.model.layers.%d.%s", m.Layer, projections[projection(m.Name)].path)
		tensors = append(tensors,
			gguf.Float32Tensor{Name: name + ".lora_A.weight", Shape: []int64{r, int64(m.In)}, Data: m.A},
			gguf.Float32Tensor{Name: name + ".lora_B.weight", Shape: []int64{int64(m.Out), r}, Data: b})
	}
	err := gguf.WriteSafetensorsFile(filepath.Join(dir, PEFTWeights), map[string]string{"format": "pt"}, tensors)
	if err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, PEFTConfig), peftConfig{
		AlphaPattern:    map[string]float64{},
		BaseModel:       w.Manifest.BaseModel,
		Bias:            "none",
		InferenceMode:   true,
		InitLoRAWeights: true,
		LoRAAlpha:       w.Manifest.Alpha,
		LoRADropout:     w.Dropout,
		PEFTType:        "LORA",
		R:               w.Manifest.Rank,
		RankPattern:     map[string]int{},
		TargetModules:   w.targets(),
		TaskType:        "CAUSAL_LM",

		LayersToTransform: w.LayersToTransform,
		UseRSLoRA:         w.UseRSLoRA,
	})
}

// HuggingFaceRows returns b, [heads*d][rank] row-major with rows in the order of a llama GGUF's q and k weights, with
// its rows in Hugging Face's order.
//
// The converter interleaves the two halves of each head, since llama.cpp rotates neighbouring pairs where Hugging Face
// rotates rows half a head apart: row h*d + 2*j + s of the GGUF is row h*d + s*(d/2) + j there.
func HuggingFaceRows(b []float32, heads, rank int) []float32 {
	return permuteRows(b, heads, rank, func(ggufRow, hfRow int) (from, to int) { return ggufRow, hfRow })
}

// GGUFRows is the inverse of HuggingFaceRows.
func GGUFRows(b []float32, heads, rank int) []float32 {
	return permuteRows(b, heads, rank, func(ggufRow, hfRow int) (from, to int) { return hfRow, ggufRow })
}

func permuteRows(b []float32, heads, rank int, direction func(ggufRow, hfRow int) (from, to int)) []float32 {
	out := make([]float32, len(b))
	size := len(b) / rank / heads // rows of a head
	for h := range heads {
		for j := range size / 2 {
			for s := range 2 {
				from, to := direction(h*size+2*j+s, h*size+s*(size/2)+j)
				copy(out[to*rank:(to+1)*rank], b[from*rank:(from+1)*rank])
			}
		}
	}
	return out
}

// writeJSON writes an indented JSON file and fsyncs it.
func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}
