package train

import (
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/modeltest"
)

// BenchmarkStep is one optimizer step of the demo's recipe on the default model: four rows of about 65 tokens, rank 16
// on all linear layers, dropout 0.05, loss on the answers.
func BenchmarkStep(b *testing.B) {
	_, model := loadModel(b, modeltest.Path(b), graph.ExactLayout(), 2)
	lora, err := model.NewLoRA(graph.LoRAOptions{Rank: 16, Alpha: 32, Dropout: 0.05, Modules: graph.AllLinear})
	if err != nil {
		b.Fatal(err)
	}
	defer lora.Close()
	initialise(lora, "true", 1)
	batch := randomBatch(model.Vocabulary, 62, 64, 66, 68)
	var answers []engine.Target
	for _, target := range batch.Targets {
		for _, segment := range batch.Segments {
			if before := segment.End - 2 - target.Position; before == 0 || before == 1 {
				answers = append(answers, target)
			}
		}
	}
	batch.Targets = answers
	m := newMoments(len(lora.Parameters))
	optimizer := AdamW{Beta1: 0.9, Beta2: 0.999, Epsilon: 1e-8}
	steps := 0
	for b.Loop() {
		clear(lora.Gradients)
		if _, err := model.Gradients(batch, lora, 1); err != nil {
			b.Fatal(err)
		}
		steps++
		optimizer.step(lora.Parameters, lora.Gradients, m, 1/(1+norm(lora.Gradients)), 1e-4, steps)
	}
	b.ReportMetric(float64(b.N*len(batch.Tokens))/b.Elapsed().Seconds(), "tokens/s")
	b.ReportMetric(float64(model.ActivationBytes())/(1<<20), "activation-MiB")
}
