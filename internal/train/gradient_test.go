package train

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/prompt"
)

// tiny loads the tiny Llama in float32 with an adapter of random weights.
func tiny(t *testing.T, o graph.LoRAOptions) (*graph.Model, *graph.LoRA) {
	t.Helper()
	_, model := loadModel(t, "testdata/tiny-llama-q4_1.gguf", graph.Layout{Forward: ggml.F32, Backward: ggml.F32}, 1)
	lora, err := model.NewLoRA(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lora.Close)
	initialise(lora, "true", 7)
	random := rand.New(rand.NewPCG(1, 2))
	for _, p := range lora.Parts {
		for i := range o.Rank * p.Out {
			lora.Parameters[p.B+i] = float32(random.NormFloat64() * 0.1)
		}
	}
	return model, lora
}

// randomBatch packs rows of the given lengths, every token after the first of a row a target of random weight.
func randomBatch(vocabulary int, lengths ...int) engine.Batch {
	random := rand.New(rand.NewPCG(3, 4))
	b := engine.Batch{Segments: engine.Rows(lengths...)}
	for _, n := range lengths {
		for i := range n {
			if i > 0 {
				b.Targets = append(b.Targets, engine.Target{Position: len(b.Tokens) - 1, Label: engine.Token(random.IntN(vocabulary)), Weight: random.Float32()})
			}
			b.Seeds = append(b.Seeds, random.Uint32())
			b.Tokens = append(b.Tokens, engine.Token(random.IntN(vocabulary)))
		}
	}
	return b
}

func weightedLoss(t *testing.T, m *graph.Model, b engine.Batch, l *graph.LoRA) float64 {
	t.Helper()
	r, err := m.Evaluate(b, l)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for i, target := range b.Targets {
		sum += float64(target.Weight) * float64(r.Losses[i])
	}
	return sum
}

func gradients(t *testing.T, m *graph.Model, b engine.Batch, l *graph.LoRA) []float32 {
	t.Helper()
	clear(l.Gradients)
	if _, err := m.Gradients(b, l, 1); err != nil {
		t.Fatal(err)
	}
	return append([]float32(nil), l.Gradients...)
}

func distance(a, b []float32) float64 {
	var d, n float64
	for i := range a {
		d += float64(a[i]-b[i]) * float64(a[i]-b[i])
		n += float64(b[i]) * float64(b[i])
	}
	return math.Sqrt(d / n)
}

// With the masks fixed by the seeds, dropout is part of a smooth function: its gradient must be that of central
// differences along random directions. That holds only if forward and backward see the same masks.
func TestGradientsWithDropoutAgainstFiniteDifferences(t *testing.T) {
	model, lora := tiny(t, graph.LoRAOptions{Rank: 5, Alpha: 8, Dropout: 0.3, Modules: graph.AllLinear})
	b := randomBatch(model.Vocabulary, 33, 7, 50)
	g := gradients(t, model, b, lora)
	random := rand.New(rand.NewPCG(5, 6))
	for range 5 {
		direction := make([]float32, len(g))
		slope := 0.0
		for _, p := range lora.Parts { // inside the rank: padding stays 0
			for _, part := range [][2]int{{p.A, lora.Rank * p.In}, {p.B, lora.Rank * p.Out}} {
				for i := part[0]; i < part[0]+part[1]; i++ {
					direction[i] = float32(random.NormFloat64())
					slope += float64(direction[i]) * float64(g[i])
				}
			}
		}
		const h = 1e-3
		move := func(by float32) {
			for i, d := range direction {
				lora.Parameters[i] += by * d
			}
		}
		move(h)
		up := weightedLoss(t, model, b, lora)
		move(-2 * h)
		down := weightedLoss(t, model, b, lora)
		move(h)
		// The differences of float32 losses of about 400 leave a few thousandths.
		if numeric := (up - down) / (2 * h); math.Abs(numeric/slope-1) > 0.02 {
			t.Errorf("slope along a random direction: gradient %g, central difference %g", slope, numeric)
		}
	}
}

func TestDropoutKeepsItsShare(t *testing.T) {
	model, lora := tiny(t, graph.LoRAOptions{Rank: 4, Alpha: 8, Dropout: 0.25, Modules: []graph.Module{graph.Query}})
	b := randomBatch(model.Vocabulary, 40)
	with := weightedLoss(t, model, b, lora)
	b.Seeds[20]++
	if again := weightedLoss(t, model, b, lora); again == with {
		t.Error("another seed gives the same mask")
	}
	b.Seeds[20]--
	if again := weightedLoss(t, model, b, lora); again != with {
		t.Error("the same seeds give other masks")
	}
	b.Seeds = nil
	if without := weightedLoss(t, model, b, lora); without == with {
		t.Error("dropout changes nothing")
	}
}

// Rows are packed without padding and attention stays inside a row: a packed batch is the sum of its rows, and so is
// one that was cut into micro-batches. More than 128 targets also take the head in chunks.
func TestPackedRowsAreTheSumOfRows(t *testing.T) {
	model, lora := tiny(t, graph.LoRAOptions{Rank: 4, Alpha: 8, Modules: graph.AllLinear})
	lengths := []int{3, 129, 17, 64, 2, 90}
	packed := randomBatch(model.Vocabulary, lengths...)
	packed.Seeds = nil
	g := gradients(t, model, packed, lora)
	clear(lora.Gradients)
	first := 0
	for r, n := range lengths {
		start := packed.Segments[r].Start
		one := engine.Batch{Tokens: packed.Tokens[start : start+n], Segments: engine.Rows(n)}
		for _, target := range packed.Targets[first : first+n-1] {
			target.Position -= start
			one.Targets = append(one.Targets, target)
		}
		first += n - 1
		if _, err := model.Gradients(one, lora, 1); err != nil {
			t.Fatal(err)
		}
	}
	if d := distance(lora.Gradients, g); d > 1e-5 {
		t.Errorf("gradients of packed rows and of single rows differ by %g", d)
	}
}

// A tiny learning signal must not vanish in the number types of the backward pass.
func TestSmallGradientsSurvive(t *testing.T) {
	model, lora := tiny(t, graph.LoRAOptions{Rank: 4, Alpha: 8, Modules: graph.AllLinear})
	b := randomBatch(model.Vocabulary, 30)
	b.Seeds = nil
	want := gradients(t, model, b, lora)
	clear(lora.Gradients)
	const scale = 1e-9
	if _, err := model.Gradients(b, lora, scale); err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i] *= scale
	}
	if d := distance(lora.Gradients, want); d > 1e-3 {
		t.Errorf("gradients scaled by %g differ by %g", scale, d)
	}
}

func TestBatchIsCheckedBeforeC(t *testing.T) {
	model, lora := tiny(t, graph.LoRAOptions{Rank: 4, Alpha: 8, Modules: graph.AllLinear})
	good := randomBatch(model.Vocabulary, 5)
	for name, spoil := range map[string]func(b *engine.Batch){
		"token":    func(b *engine.Batch) { b.Tokens = []engine.Token{0, 1, 2, 3, engine.Token(model.Vocabulary)} },
		"label":    func(b *engine.Batch) { b.Targets = []engine.Target{{Position: 0, Label: -1, Weight: 1}} },
		"position": func(b *engine.Batch) { b.Targets = []engine.Target{{Position: 5, Weight: 1}} },
		"order":    func(b *engine.Batch) { b.Targets = []engine.Target{{Position: 3, Weight: 1}, {Position: 3, Weight: 1}} },
		"segments": func(b *engine.Batch) { b.Segments = engine.Rows(4) },
		"seeds":    func(b *engine.Batch) { b.Seeds = b.Seeds[:2] },
		"targets":  func(b *engine.Batch) { b.Targets = nil },
		"nothing":  func(b *engine.Batch) { *b = engine.Batch{} },
	} {
		b := good
		spoil(&b)
		if _, err := model.Gradients(b, lora, 1); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// rowOf is a row whose tokens are all trained.
func rowOf(tokens []engine.Token) []prompt.Row {
	r := prompt.Row{Tokens: tokens, Weights: make([]float32, len(tokens))}
	for i := 1; i < len(tokens); i++ {
		r.Weights[i] = 1
	}
	return []prompt.Row{r}
}
