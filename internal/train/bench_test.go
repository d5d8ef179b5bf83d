package train

import (
	"encoding/json"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/prompt"
)

// BenchmarkStep is one optimizer step, with packing, of rows as the example questions are on the default model: about 80
// tokens, of which the first 25 are common. `make bench-train` measures the commands, with the peers.
func BenchmarkStep(b *testing.B) {
	for name, c := range map[string]struct {
		rank, batch int
		modules     []graph.Module
		allTokens   bool
	}{
		"all tokens, r 8 on q and v": {8, 8, []graph.Module{graph.Query, graph.Value}, true},
		"answers, r 8 on q and v":    {8, 8, []graph.Module{graph.Query, graph.Value}, false},
		"answers, r 16 on all":       {16, 4, graph.AllLinear, false}, // the demo's recipe
	} {
		b.Run(name, func(b *testing.B) {
			backend, model := loadModel(b, modeltest.Path(b), graph.ExactLayout(), 2)
			adapter, err := model.NewLoRA(graph.LoRAOptions{Rank: c.rank, Alpha: 2 * float64(c.rank), Dropout: 0.05, Modules: c.modules})
			if err != nil {
				b.Fatal(err)
			}
			defer adapter.Close()
			initialise(adapter, "true", 1)
			t := &trainer{
				reporter: reporter{encoder: json.NewEncoder(io.Discard)}, backend: backend, model: model, lora: adapter,
				moments: newMoments(len(adapter.Parameters)), objective: supervised{},
				plan: child.TrainPlan{
					BatchSize: c.batch, LoraDropout: 0.05, PrefixSharing: true, TotalSteps: 1 << 30, LoggingSteps: 1,
					AdamBeta1: 0.9, AdamBeta2: 0.999, AdamEpsilon: 1e-8, MaxGradNorm: 1,
				},
			}
			t.compute = func(m dataset.Micro) (engine.Result, error) { return model.Gradients(m.Batch, adapter, 1) }
			examples := questions80(model.Vocabulary, 64, c.allTokens)
			if t.data, err = dataset.New(examples...); err != nil {
				b.Fatal(err)
			}
			defer t.data.Close()
			tokens, at := 0, 0
			schedule := Schedule{Kind: "constant", Peak: 1e-4, Total: 1 << 30}
			for b.Loop() {
				w := t.pack(examples[at:at+c.batch], 0, defaultMicroTokens)
				at = (at + c.batch) % len(examples)
				if err := t.optimize(b.Context(), w, schedule); err != nil {
					b.Fatal(err)
				}
				tokens += w.tokens
			}
			b.ReportMetric(float64(tokens)/b.Elapsed().Seconds(), "real-tokens/s")
			b.ReportMetric(float64(b.N*c.batch)/b.Elapsed().Seconds(), "questions/s")
		})
	}
}

// questions80 are random rows of 60 to 100 tokens that begin with the same 25; the last two are the answer.
func questions80(vocabulary, n int, allTokens bool) []dataset.Example {
	random := rand.New(rand.NewPCG(1, 2))
	tokens := func(n int) []engine.Token {
		out := make([]engine.Token, n)
		for i := range out {
			out[i] = engine.Token(random.IntN(vocabulary))
		}
		return out
	}
	common := tokens(25)
	var examples []dataset.Example
	for i := range n {
		r := prompt.Row{Tokens: slices.Concat(common, tokens(35+random.IntN(41)))}
		r.Weights = make([]float32, len(r.Tokens))
		for k := range r.Weights {
			if k > 0 && (allTokens || k >= len(r.Weights)-2) {
				r.Weights[k] = 1
			}
		}
		examples = append(examples, dataset.Example{Row: i, Candidates: []prompt.Row{r}, Tokens: len(r.Tokens)})
	}
	return examples
}
