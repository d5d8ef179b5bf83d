package graph_test

import (
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/engine/enginetest"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/reference"
)

// trainer is a model and its adapter behind the interface of the suite.
type trainer struct {
	t     *testing.T
	model *graph.Model
	lora  *graph.LoRA
}

func open(t *testing.T, layout graph.Layout, path string, a enginetest.Adapter) enginetest.Trainer {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	backend, err := ggml.NewCPU(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	model, err := graph.Load(file, backend, layout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(model.Close)
	options := graph.LoRAOptions{Rank: a.Rank, Alpha: a.Alpha, Dropout: a.Dropout}
	for _, site := range a.Sites {
		module, err := graph.ParseModule(string(site.Module))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(options.Modules, module) {
			options.Modules = append(options.Modules, module)
		}
		if !slices.Contains(options.Layers, site.Layer) {
			options.Layers = append(options.Layers, site.Layer)
		}
	}
	lora, err := model.NewLoRA(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lora.Close)
	if len(lora.Parts) != len(a.Sites) {
		t.Fatalf("the adapter has %d pairs, expected %d", len(lora.Parts), len(a.Sites))
	}
	return trainer{t, model, lora}
}

func (r trainer) part(site reference.Site) graph.Part {
	r.t.Helper()
	for _, p := range r.lora.Parts {
		if p.Layer == site.Layer && p.Module.String() == string(site.Module) {
			return p
		}
	}
	r.t.Fatalf("the adapter has no pair for %v", site)
	return graph.Part{}
}

func (r trainer) Set(site reference.Site, a, b []float32) { r.lora.SetMatrices(r.part(site), a, b) }

func (r trainer) Gradient(site reference.Site) (a, b []float32) {
	return r.lora.Matrices(r.lora.Gradients, r.part(site))
}

func (r trainer) Clear() { clear(r.lora.Gradients) }

func (r trainer) Gradients(b engine.Batch, scale float32) (engine.Result, error) {
	return r.model.Gradients(b, r.lora, scale)
}

func (r trainer) Evaluate(b engine.Batch) (engine.Result, error) { return r.model.Evaluate(b, r.lora) }

func (r trainer) Logits(b engine.Batch) ([][]float32, error) { return r.model.Logits(b, r.lora) }

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name      string
		layout    graph.Layout
		tolerance enginetest.Tolerance
	}{
		{"float32", graph.Layout{Forward: ggml.F32, Backward: ggml.F32}, enginetest.Tolerance{Values: 1e-4, Gradients: 1e-4}},
		// Measured: at most 0.3% of logits and 0.4% of gradients with block floating point, 0.8% of gradients where only the
		// backward pass rounds, to BF16. The bar of the golden files is 3%.
		{"default", graph.ExactLayout(), enginetest.Tolerance{Values: 0.01, Gradients: 0.015}},
		// BF16 keeps 8 bits of both factors of every product, in both passes. Measured: at most 3% and 6.5%.
		{"bfloat16", graph.Layout{Forward: ggml.BF16, Backward: ggml.BF16}, enginetest.Tolerance{Values: 0.05, Gradients: 0.1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			enginetest.Run(t, func(t *testing.T, path string, a enginetest.Adapter) enginetest.Trainer {
				return open(t, c.layout, path, a)
			}, c.tolerance)
		})
	}
}
