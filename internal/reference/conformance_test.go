package reference_test

import (
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/engine/enginetest"
	"github.com/hone-llm/hone/internal/reference"
)

// trainer is the reference behind the interface of the suite.
type trainer struct {
	model *reference.Model
	lora  *reference.LoRA
}

func (r trainer) Set(site reference.Site, a, b []float32) {
	pair := r.lora.Pairs[site]
	fill := func(m reference.Matrix, values []float32) {
		for i, v := range values {
			m[i/len(m[0])][i%len(m[0])] = float64(v)
		}
	}
	fill(pair.A, a)
	fill(pair.B, b)
}

func (r trainer) Gradient(site reference.Site) (a, b []float32) {
	pair := r.lora.Pairs[site]
	return enginetest.Flat(pair.GradA), enginetest.Flat(pair.GradB)
}

func (r trainer) Clear() {
	for _, p := range r.lora.Pairs {
		for _, m := range []reference.Matrix{p.GradA, p.GradB} {
			for _, row := range m {
				clear(row)
			}
		}
	}
}

func (r trainer) Gradients(b engine.Batch, scale float32) (engine.Result, error) {
	return r.model.Gradients(b, r.lora, float64(scale))
}

func (r trainer) Evaluate(b engine.Batch) (engine.Result, error) {
	p, err := r.model.Forward(b, r.lora)
	if err != nil {
		return engine.Result{}, err
	}
	return p.Result(), nil
}

func (r trainer) Logits(b engine.Batch) ([][]float32, error) {
	p, err := r.model.Forward(b, r.lora)
	if err != nil {
		return nil, err
	}
	var rows [][]float32
	for i, target := range b.Targets {
		if i == 0 || target.Position > b.Targets[i-1].Position {
			rows = append(rows, enginetest.Flat(p.Logits[i:i+1]))
		}
	}
	return rows, nil
}

func TestConformance(t *testing.T) {
	enginetest.Run(t, func(t *testing.T, path string, a enginetest.Adapter) enginetest.Trainer {
		model, lora := enginetest.OpenReference(t, path, a)
		return trainer{model, lora}
	}, enginetest.Tolerance{Values: 1e-6, Gradients: 1e-6}) // float32 at the border is all that rounds
}
