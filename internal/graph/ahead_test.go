package graph

import (
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
)

// What is made ahead changes no bit, whether it is what comes next, something else or nothing, and none is left over.
func TestAhead(t *testing.T) {
	t.Parallel()
	models, loras := openBoth(t, "../train/testdata/tiny-llama-q8_0.gguf", LoRAOptions{Rank: 4, Alpha: 4, Dropout: 0.1, Modules: AllLinear})
	for i, name := range []string{"fused", "plain"} {
		t.Run(name, func(t *testing.T) {
			m, l := models[i], loras[i]
			var batches []engine.Batch
			for n := range 4 {
				b := forest(m.Vocabulary)
				b.Seeds = make([]uint32, len(b.Tokens))
				for j := range b.Seeds {
					b.Seeds[j] = uint32(100*n + j)
				}
				batches = append(batches, b)
			}
			gradients := func(announce func(i int) (engine.Batch, bool)) []float32 {
				clear(l.Gradients)
				for i, b := range batches {
					if announce != nil {
						m.Ahead(l, 1, func() (engine.Batch, bool) { return announce(i) })
					}
					if _, err := m.Gradients(b, l, 1); err != nil {
						t.Fatal(err)
					}
				}
				return slices.Clone(l.Gradients)
			}
			want := gradients(nil)
			for name, announce := range map[string]func(i int) (engine.Batch, bool){
				"next": func(i int) (engine.Batch, bool) {
					if i+1 == len(batches) {
						return engine.Batch{}, false
					}
					return batches[i+1], true
				},
				"other":   func(i int) (engine.Batch, bool) { return batches[i], true },
				"invalid": func(int) (engine.Batch, bool) { return engine.Batch{}, true },
			} {
				if !slices.Equal(gradients(announce), want) {
					t.Errorf("%s announced: other gradients", name)
				}
			}
		})
	}
}
