package lora

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/gguf"
)

// Read reads an adapter directory, to continue training from it: one that Export wrote, or one that PEFT saved
// (adapter_config.json and adapter_model.safetensors of F32, F16 or BF16 tensors), or one that holds adapter.gguf alone.
// base is the base model's file: every pair must fit it, and its architecture decides the order of the rows of B, which
// is that of the base file in the result, as in Weights.
//
// Manifest.Rank, Alpha (PEFT's lora_alpha) and TargetModules are always set, the rest of the manifest if the directory
// has one; comparing Manifest.BaseDigest is the caller's. The files must have the digests that the manifest lists. All
// adapted layers have the same modules, in the order of layers and then of the computation.
//
// What changes an adapter's meaning beyond rank, alpha and rsLoRA is refused by the name of its field: rank_pattern,
// alpha_pattern, DoRA, biases, saved modules, and initialisations that change the base model's weights.
func Read(dir string, base *gguf.File) (Weights, error) {
	w, err := read(dir, base)
	if err != nil {
		return Weights{}, fmt.Errorf("read adapter %s: %w", dir, err)
	}
	return w, nil
}

func read(dir string, base *gguf.File) (Weights, error) {
	w := Weights{}
	w.Architecture, _ = base.Metadata.String("general.architecture")
	heads, _ := base.Metadata.Int(w.Architecture + ".attention.head_count")
	kvHeads, ok := base.Metadata.Int(w.Architecture + ".attention.head_count_kv")
	if !ok {
		kvHeads = heads
	}
	w.Heads, w.KVHeads = int(heads), int(kvHeads)

	switch manifest, err := ReadManifest(dir); {
	case err == nil:
		w.Manifest = manifest
		for name, want := range manifest.Files {
			if got, err := durable.Digest(filepath.Join(dir, name)); err != nil {
				return w, err
			} else if got != want {
				return w, fmt.Errorf("%s has the sha256 %s, its manifest says %s: the file was changed", name, got, want)
			}
		}
	case !errors.Is(err, fs.ErrNotExist):
		return w, err
	}
	var err error
	if exists(dir, PEFTConfig) { // the only form that says whether rsLoRA scaled the weights
		err = w.readPEFT(dir)
	} else if exists(dir, GGUFFile) {
		err = w.readGGUF(filepath.Join(dir, GGUFFile), base)
	} else {
		err = fmt.Errorf("it has neither %s nor %s", PEFTConfig, GGUFFile)
	}
	if err != nil {
		return w, err
	}
	if err := w.fits(base); err != nil {
		return w, err
	}
	w.Manifest.TargetModules = w.targets()
	layers := w.layers()
	if total, ok := base.Metadata.Int(w.Architecture + ".block_count"); !ok || int64(len(layers)) < total {
		w.LayersToTransform = layers
	}
	return w, w.validate()
}

func exists(dir, name string) bool {
	_, err := os.Stat(filepath.Join(dir, name))
	return err == nil
}

// pairs collects tensors until every module has both of its halves.
type pairs map[[2]int]*Module // by layer and projection

func (p pairs) of(layer, index int) *Module {
	key := [2]int{layer, index}
	if p[key] == nil {
		p[key] = &Module{Layer: layer, Name: projections[index].name}
	}
	return p[key]
}

// set stores one half, a matrix of rows x columns.
func (p pairs) set(tensor string, layer, index int, isA bool, rows, columns int64, data []float32, rank int) error {
	m := p.of(layer, index)
	half, got, expected := &m.B, columns, "columns"
	if isA {
		half, got, expected = &m.A, rows, "rows"
	}
	if got != int64(rank) {
		return fmt.Errorf("tensor %q has %d %s, expected the rank %d", tensor, got, expected, rank)
	}
	if *half != nil {
		return fmt.Errorf("tensor %q: layer %d %s occurs twice", tensor, layer, m.Name)
	}
	*half = data
	if isA {
		m.In = int(columns)
	} else {
		m.Out = int(rows)
	}
	return nil
}

// modules lists the pairs in order. All layers must have the same ones.
func (p pairs) modules() ([]Module, error) {
	var layers, indices []int
	for key, m := range p {
		if m.A == nil || m.B == nil {
			return nil, fmt.Errorf("layer %d %s has only one half of its pair", key[0], m.Name)
		}
		layers, indices = append(layers, key[0]), append(indices, key[1])
	}
	if len(p) == 0 {
		return nil, errors.New("it adapts nothing")
	}
	slices.Sort(layers)
	slices.Sort(indices)
	var out []Module
	for _, layer := range slices.Compact(layers) {
		for _, index := range slices.Compact(slices.Clone(indices)) {
			m := p[[2]int{layer, index}]
			if m == nil {
				return nil, fmt.Errorf("layer %d has no %s, but other layers do: expected the same modules in every adapted layer", layer, projections[index].name)
			}
			out = append(out, *m)
		}
	}
	return out, nil
}

// peftSettings are the fields of adapter_config.json that decide what the tensors mean. TargetModules may be a list, a
// regular expression or "all-linear": which modules are meant is plain from the tensors.
type peftSettings struct {
	PEFTType      string          `json:"peft_type"`
	R             int             `json:"r"`
	LoRAAlpha     float64         `json:"lora_alpha"`
	LoRADropout   float64         `json:"lora_dropout"`
	UseRSLoRA     bool            `json:"use_rslora"`
	TargetModules json.RawMessage `json:"target_modules"`
}

// plainPEFT lists the fields of a LoraConfig that must have one of the given values, or be absent.
var plainPEFT = map[string][]string{
	"alora_invocation_tokens": {"null"},
	"alpha_pattern":           {"{}", "null"},
	"bias":                    {`"none"`},
	"fan_in_fan_out":          {"false"},
	// Others (pissa, olora, corda, loftq, ...) train beside base weights that they have changed.
	"init_lora_weights":       {"true", "false", `"gaussian"`, `"orthogonal"`, `"eva"`},
	"kasa_config":             {"null"},
	"layer_replication":       {"null"},
	"loftq_config":            {"{}", "null"},
	"lora_bias":               {"false"},
	"lora_ga_config":          {"null"},
	"modules_to_save":         {"null", "[]"},
	"rank_pattern":            {"{}", "null"},
	"target_parameters":       {"null", "[]"},
	"trainable_token_indices": {"null"},
	"use_bdlora":              {"null", "false"},
	"use_dora":                {"false"},
	"use_qalora":              {"false"},
}

func (w *Weights) readPEFT(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, PEFTConfig))
	if err != nil {
		return err
	}
	var settings peftSettings
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(data, &settings); err != nil {
		return fmt.Errorf("%s: %w", PEFTConfig, err)
	}
	if err := json.Unmarshal(data, &fields); err != nil {
		return fmt.Errorf("%s: %w", PEFTConfig, err)
	}
	if settings.PEFTType != "LORA" {
		return fmt.Errorf("%s: peft_type is %q, only LORA can be continued", PEFTConfig, settings.PEFTType)
	}
	for field, plain := range plainPEFT {
		if value := strings.Join(strings.Fields(string(fields[field])), ""); value != "" && !slices.Contains(plain, value) {
			return fmt.Errorf("%s: %s is %s: such an adapter cannot be continued, expected %s", PEFTConfig, field, value, strings.Join(plain, " or "))
		}
	}
	if settings.R < 1 || settings.LoRAAlpha <= 0 {
		return fmt.Errorf("%s: r is %d and lora_alpha %v, expected positive numbers", PEFTConfig, settings.R, settings.LoRAAlpha)
	}
	w.Manifest.Rank, w.Manifest.Alpha = settings.R, settings.LoRAAlpha
	w.UseRSLoRA, w.Dropout = settings.UseRSLoRA, settings.LoRADropout

	if !exists(dir, PEFTWeights) && exists(dir, "adapter_model.bin") {
		return fmt.Errorf("the weights are in adapter_model.bin, expected %s: save the adapter again with safe_serialization=True", PEFTWeights)
	}
	tensors, _, err := gguf.ReadSafetensors(filepath.Join(dir, PEFTWeights))
	if err != nil {
		return err
	}
	found := pairs{}
	for _, t := range tensors {
		layer, index, isA, ok := parsePEFT(t.Name)
		if !ok {
			return fmt.Errorf("tensor %q is no lora_A.weight or lora_B.weight of a linear layer that can be trained", t.Name)
		}
		if len(t.Shape) != 2 {
			return fmt.Errorf("tensor %q has the shape %v, expected a matrix", t.Name, t.Shape)
		}
		values := t.Data
		if heads, yes := w.permuted(projections[index].name); yes && !isA {
			if heads < 1 || t.Shape[0]%int64(2*heads) != 0 || t.Shape[1] != int64(settings.R) {
				return fmt.Errorf("tensor %q has the shape %v, expected the rows of %d heads and the rank %d", t.Name, t.Shape, heads, settings.R)
			}
			values = GGUFRows(values, heads, settings.R)
		}
		if err := found.set(t.Name, layer, index, isA, t.Shape[0], t.Shape[1], values, settings.R); err != nil {
			return err
		}
	}
	w.Modules, err = found.modules()
	return err
}

// parsePEFT takes a name such as base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight apart.
func parsePEFT(name string) (layer, index int, isA, ok bool) {
	rest, ok := strings.CutPrefix(name, "base_model.model.model.layers.")
	if !ok {
		return 0, 0, false, false
	}
	number, rest, _ := strings.Cut(rest, ".")
	layer, err := strconv.Atoi(number)
	path, isA := strings.CutSuffix(rest, ".lora_A.weight")
	if !isA {
		if path, ok = strings.CutSuffix(rest, ".lora_B.weight"); !ok {
			return 0, 0, false, false
		}
	}
	for i, p := range projections {
		if p.path == path {
			return layer, i, isA, err == nil && layer >= 0
		}
	}
	return 0, 0, false, false
}

func (w *Weights) readGGUF(path string, base *gguf.File) error {
	f, err := gguf.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := gguf.CheckAdapter(f, base); err != nil {
		return err
	}
	found := pairs{}
	for _, t := range f.Tensors {
		layer, index, isA, ok := parseGGUF(t.Name)
		if !ok {
			return fmt.Errorf("tensor %q is of no linear layer that can be trained", t.Name)
		}
		columns, rows := t.Shape[0], t.Shape[1] // ne order
		if w.Manifest.Rank == 0 {
			if w.Manifest.Rank = int(columns); isA {
				w.Manifest.Rank = int(rows)
			}
		}
		values, err := f.Floats(t)
		if err != nil {
			return err
		}
		if err := found.set(t.Name, layer, index, isA, rows, columns, values, w.Manifest.Rank); err != nil {
			return err
		}
	}
	alpha, _ := f.Metadata.Float("adapter.lora.alpha")
	if alpha == 0 { // llama.cpp: no scaling
		alpha = float64(w.Manifest.Rank)
	}
	w.Manifest.Alpha = alpha
	w.Modules, err = found.modules()
	return err
}

// parseGGUF takes a name such as blk.3.attn_q.weight.lora_a apart.
func parseGGUF(name string) (layer, index int, isA, ok bool) {
	for i, p := range projections {
		for _, suffix := range []string{gguf.SuffixA, gguf.SuffixB} {
			number, found := strings.CutSuffix(strings.TrimPrefix(name, "blk."), "."+p.tensor+".weight"+suffix)
			if !found {
				continue
			}
			layer, err := strconv.Atoi(number)
			return layer, i, suffix == gguf.SuffixA, err == nil && layer >= 0
		}
	}
	return 0, 0, false, false
}

// layers are the distinct layers of the modules, which are in order.
func (w *Weights) layers() []int {
	var out []int
	for _, m := range w.Modules {
		out = append(out, m.Layer)
	}
	return slices.Compact(out)
}

// fits compares every pair with the weight that it adapts.
func (w *Weights) fits(base *gguf.File) error {
	for _, m := range w.Modules {
		name := fmt.Sprintf("blk.%d.%s.weight", m.Layer, projections[projection(m.Name)].tensor)
		t, ok := base.Tensor(name)
		if !ok || len(t.Shape) != 2 {
			return fmt.Errorf("it adapts layer %d %s, but the base model has no %s", m.Layer, m.Name, name)
		}
		if int64(m.In) != t.Shape[0] || int64(m.Out) != t.Shape[1] {
			return fmt.Errorf("layer %d %s is for a weight of %d x %d, but the base model's %s is %d x %d: the adapter belongs to another model",
				m.Layer, m.Name, m.Out, m.In, name, t.Shape[1], t.Shape[0])
		}
	}
	return nil
}
