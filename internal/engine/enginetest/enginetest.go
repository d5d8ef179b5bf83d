// Package enginetest is the conformance suite of engines that train: what every implementation of a training step over
// engine.Batch must compute and refuse. Its oracle is internal/reference.
//
//	func TestConformance(t *testing.T) {
//		enginetest.Run(t, func(t *testing.T, path string, a enginetest.Adapter) enginetest.Trainer { ... }, tolerance)
//	}
package enginetest

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/reference"
)

// Trainer is an engine that holds one model and one adapter.
type Trainer interface {
	// Set gives a pair its weights in PEFT's shapes, row-major: a [rank, in], b [out, rank].
	Set(site reference.Site, a, b []float32)
	// Gradient returns what Gradients has added up since Clear, in the same shapes.
	Gradient(site reference.Site) (a, b []float32)
	Clear()
	// Gradients runs a micro-batch forward and backward and adds the gradient of scale * sum(weight * loss).
	Gradients(b engine.Batch, scale float32) (engine.Result, error)
	// Evaluate runs it forward, and does not call Weigh.
	Evaluate(b engine.Batch) (engine.Result, error)
	// Logits returns those of each position that has targets, once: [positions][vocabulary].
	Logits(b engine.Batch) ([][]float32, error)
}

// Adapter describes the adapter that a Trainer is opened with, its weights all 0.
type Adapter struct {
	Rank           int
	Alpha, Dropout float64
	Sites          []reference.Site
}

// Open opens a model file with an adapter. It may skip the test with a reason, and cleans up after it.
type Open func(t *testing.T, path string, a Adapter) Trainer

// Tolerance bounds relative errors against the float64 reference: of a target's loss and logits, and of the gradient of
// one matrix, by their norm.
type Tolerance struct{ Values, Gradients float64 }

// Run runs the suite.
func Run(t *testing.T, open Open, tolerance Tolerance) {
	for _, m := range Models {
		t.Run(m.Name, func(t *testing.T) {
			for _, c := range []struct {
				name    string
				adapter Adapter
			}{
				{"all-linear", Adapter{Rank: 5, Alpha: 8, Sites: reference.Sites(layers, reference.Modules...)}},
				{"q-v", Adapter{Rank: 20, Alpha: 8, Sites: reference.Sites(layers, reference.Query, reference.Value)}},
				{"one-site", Adapter{Rank: 16, Alpha: 1, Sites: []reference.Site{{Layer: 1, Module: reference.Up}}}},
				{"rank-1", Adapter{Rank: 1, Alpha: 2, Sites: reference.Sites(layers, reference.Modules...)}},
				{"rank-256", Adapter{Rank: 256, Alpha: 256, Sites: reference.Sites(layers, reference.Query, reference.Down)}},
				{"dropout", Adapter{Rank: 4, Alpha: 8, Dropout: 0.3, Sites: reference.Sites(layers, reference.Modules...)}},
			} {
				if m.Type != gguf.F32 && c.name != "all-linear" {
					continue
				}
				t.Run(c.name, func(t *testing.T) { newSuite(t, open, tolerance, m, c.adapter).agrees(t) })
			}
			if m.Type != gguf.F32 {
				return
			}
			adapter := Adapter{Rank: 5, Alpha: 8, Sites: reference.Sites(layers, reference.Modules...)}
			if m.Name == "qwen3" { // one is enough: the reference is slow
				t.Run("large-batch", func(t *testing.T) { newSuite(t, open, tolerance, m, adapter).largeBatch(t) })
			}
			for _, c := range []struct {
				name  string
				check func(*suite, *testing.T)
			}{
				{"packed-rows", (*suite).packedRows},
				{"shared-segments", (*suite).sharedSegments},
				{"weigh", (*suite).weigh},
				{"weigh-fails", (*suite).weighFails},
				{"small-gradients", (*suite).smallGradients},
				{"accumulation", (*suite).accumulation},
				{"zero-weights", (*suite).zeroWeights},
				{"new-adapter", (*suite).newAdapter},
				{"refused-batches", (*suite).refusedBatches},
			} {
				t.Run(c.name, func(t *testing.T) { c.check(newSuite(t, open, tolerance, m, adapter), t) })
			}
		})
	}
}

// suite is an engine and the reference with the same model and adapter.
type suite struct {
	Trainer
	tolerance Tolerance
	adapter   Adapter
	model     *reference.Model
	lora      *reference.LoRA
}

func newSuite(t *testing.T, open Open, tolerance Tolerance, m Model, a Adapter) *suite {
	t.Helper()
	path := m.Write(t)
	s := &suite{Trainer: open(t, path, a), tolerance: tolerance, adapter: a}
	s.model, s.lora = OpenReference(t, path, a)
	random := rand.New(rand.NewPCG(1, 2))
	for _, site := range a.Sites {
		pair := s.lora.Pairs[site]
		fill := func(m reference.Matrix, deviation float64) {
			for _, row := range m {
				for i := range row {
					row[i] = float64(float32(deviation * random.NormFloat64()))
				}
			}
		}
		fill(pair.A, 1/math.Sqrt(float64(len(pair.A[0]))))
		fill(pair.B, 0.2)
		s.Set(site, Flat(pair.A), Flat(pair.B))
	}
	return s
}

// OpenReference loads a model file and an adapter of zeros in the reference.
func OpenReference(t testing.TB, path string, a Adapter) (*reference.Model, *reference.LoRA) {
	t.Helper()
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	model, err := reference.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	lora := model.NewLoRA(a.Rank, a.Alpha/float64(a.Rank), a.Sites)
	if a.Dropout > 0 {
		lora.Mask = reference.Dropout(a.Dropout)
	}
	return model, lora
}

// Flat is a matrix in float32, row-major.
func Flat(m reference.Matrix) []float32 {
	var out []float32
	for _, row := range m {
		for _, v := range row {
			out = append(out, float32(v))
		}
	}
	return out
}

// Forest is a seeded batch with every kind of segment: a row of its own, a prefix with two continuations, one of which
// branches again, a row of one token. Every token but few is followed by a target, some by several.
func Forest() engine.Batch {
	random := rand.New(rand.NewPCG(3, 4))
	b := engine.Batch{Segments: []engine.Segment{
		{Start: 0, End: 19, Parent: -1},  // a row
		{Start: 19, End: 28, Parent: -1}, // a prefix
		{Start: 28, End: 33, Parent: 1},
		{Start: 33, End: 40, Parent: 1}, // a prefix of prefix + 7
		{Start: 40, End: 41, Parent: 3},
		{Start: 41, End: 60, Parent: 3},
		{Start: 60, End: 61, Parent: -1}, // a row of one token
		{Start: 61, End: 64, Parent: 1},  // back to the first prefix
	}}
	for position := range 64 {
		b.Tokens = append(b.Tokens, engine.Token(random.IntN(vocabulary)))
		b.Seeds = append(b.Seeds, random.Uint32())
		if position%7 == 3 {
			continue
		}
		label := random.IntN(vocabulary / 2)
		b.Targets = append(b.Targets, engine.Target{Position: position, Label: engine.Token(label), Weight: random.Float32()})
		if position%5 == 2 {
			b.Targets = append(b.Targets,
				engine.Target{Position: position, Label: engine.Token(label + 1), Weight: random.Float32()},
				engine.Target{Position: position, Label: vocabulary - 1, Weight: -random.Float32()})
		}
	}
	return b
}

// large is a seeded forest of 400 tokens in long and short segments, more than any block of a kernel holds, each of which
// is followed by a target.
func large() engine.Batch {
	random := rand.New(rand.NewPCG(9, 10))
	b := engine.Batch{Segments: []engine.Segment{
		{Start: 0, End: 131, Parent: -1}, {Start: 131, End: 164, Parent: 0}, {Start: 164, End: 260, Parent: 0}, {Start: 260, End: 262, Parent: 2},
		{Start: 262, End: 327, Parent: 2}, {Start: 327, End: 400, Parent: -1},
	}}
	for position := range 400 {
		b.Tokens = append(b.Tokens, engine.Token(random.IntN(vocabulary)))
		b.Targets = append(b.Targets, engine.Target{Position: position, Label: engine.Token(random.IntN(vocabulary)), Weight: random.Float32()})
	}
	return b
}

// Preference is a batch of two answers to one prompt, with the objective of DPO without a reference model,
// https://arxiv.org/abs/2305.18290: -log sigmoid(beta * (loss of the rejected answer - loss of the chosen one)). It
// returns the batch, whose Weigh is that objective's derivative, and the objective itself.
func Preference(beta float64) (engine.Batch, func(losses []float64) float64) {
	random := rand.New(rand.NewPCG(5, 6))
	b := engine.Batch{Segments: []engine.Segment{{Start: 0, End: 12, Parent: -1}, {Start: 12, End: 19, Parent: 0}, {Start: 19, End: 30, Parent: 0}}}
	for range 30 {
		b.Tokens = append(b.Tokens, engine.Token(random.IntN(vocabulary)))
	}
	var signs []float64 // 1 for the chosen answer's targets, -1 for the rejected one's
	target := func(position int, label engine.Token, sign float64) {
		b.Targets = append(b.Targets, engine.Target{Position: position, Label: label})
		signs = append(signs, sign)
	}
	target(11, 20, 1) // the first tokens of both answers, after the prompt's last
	target(11, 30, -1)
	for position := 12; position < 30; position++ {
		sign := 1.0
		if position >= 19 {
			sign = -1
		}
		target(position, engine.Token(random.IntN(vocabulary)), sign)
	}
	objective := func(losses []float64) float64 {
		difference := 0.0
		for i, loss := range losses {
			difference -= signs[i] * loss
		}
		return math.Log1p(math.Exp(-beta * difference))
	}
	b.Weigh = func(losses []float32) ([]float32, error) {
		difference := 0.0
		for i, loss := range losses {
			difference -= signs[i] * float64(loss)
		}
		weights := make([]float32, len(losses))
		for i := range weights {
			weights[i] = float32(beta * signs[i] / (1 + math.Exp(beta*difference)))
		}
		return weights, nil
	}
	return b, objective
}
