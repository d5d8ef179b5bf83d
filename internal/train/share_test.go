package train

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/prompt"
)

// sharing makes examples whose rows have a prefix in common at several depths: an instruction that all have, blocks of
// questions in it, pairs and choices after one prompt, rows that are others' beginnings and rows that are there twice.
// Weights lie in the shared parts too, and differ between rows.
func sharing(vocabulary int) []dataset.Example {
	random := rand.New(rand.NewPCG(1, 2))
	tokens := func(n int) []engine.Token {
		out := make([]engine.Token, n)
		for i := range out {
			out[i] = engine.Token(random.IntN(vocabulary))
		}
		return out
	}
	// trained gives about half of the tokens after the first a weight.
	trained := func(parts ...[]engine.Token) prompt.Row {
		row := prompt.Row{Tokens: slices.Concat(parts...)}
		for range row.Tokens {
			row.Weights = append(row.Weights, float32(random.IntN(2))*(0.25+random.Float32()))
		}
		row.Weights[len(row.Weights)-1] = 1
		return row
	}
	instruction := tokens(25)
	first, second := slices.Concat(instruction, tokens(17)), slices.Concat(instruction, tokens(9))
	question := slices.Concat(first, tokens(11))
	same := trained(question, tokens(4))
	candidates := [][]prompt.Row{
		{trained(first, tokens(30))},
		{trained(second, tokens(12))},
		{trained(first, tokens(8))},
		{trained(question, tokens(6)), trained(question, tokens(2))}, // a pair
		{trained(question, tokens(1)), trained(question, tokens(1)), trained(question, tokens(1))}, // choices: several labels after one position
		{trained(first)},                                                                                            // a beginning of others
		{trained(instruction, tokens(3))},                                                                           // a fork inside the instruction's block
		{trained(instruction[:12], tokens(20))},                                                                     // a fork inside the instruction
		{trained(tokens(40))},                                                                                       // shares nothing
		{same}, {{Tokens: same.Tokens, Weights: slices.Clone(same.Weights)}}, {trained(instruction[:5], tokens(9))}, // too little to share
	}
	var examples []dataset.Example
	for i, c := range candidates {
		examples = append(examples, dataset.Example{Row: i, Candidates: c, Tokens: len(c[0].Tokens)})
	}
	return examples
}

// Rows that share prefixes compute them once, and that changes nothing: losses and gradients are those of each candidate
// computed alone.
func TestSharedPrefixesAreExact(t *testing.T) {
	model, lora := tiny(t, graph.LoRAOptions{Rank: 4, Alpha: 8, Modules: graph.AllLinear})
	examples := sharing(model.Vocabulary)

	losses := make(map[[2]int]float64)
	clear(lora.Gradients)
	tokens := 0
	for i, e := range examples {
		for c, row := range e.Candidates {
			b := engine.Batch{Tokens: row.Tokens, Segments: engine.Rows(len(row.Tokens))}
			for p, w := range row.Weights {
				if p > 0 && w != 0 {
					b.Targets = append(b.Targets, engine.Target{Position: p - 1, Label: row.Tokens[p], Weight: w})
				}
			}
			r, err := model.Gradients(b, lora, 1)
			if err != nil {
				t.Fatal(err)
			}
			for j, target := range b.Targets {
				losses[[2]int{i, c}] += float64(target.Weight) * float64(r.Losses[j])
			}
			tokens += len(row.Tokens)
		}
	}
	alone := slices.Clone(lora.Gradients)

	for _, test := range []struct {
		name  string
		limit int
		share bool
	}{
		{"one micro-batch", 10000, true}, {"several micro-batches", 150, true}, {"candidates of an example only", 10000, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			clear(lora.Gradients)
			computed, segments := 0, 0
			worst := 0.0
			for _, m := range dataset.Pack(examples, test.limit, test.share) {
				r, err := model.Gradients(m.Batch, lora, 1)
				if err != nil {
					t.Fatal(err)
				}
				computed += len(m.Batch.Tokens)
				segments += len(m.Batch.Segments)
				for _, c := range m.Candidates {
					sum := 0.0
					for i, target := range c.Targets {
						sum += float64(c.Weights[i]) * float64(r.Losses[target])
					}
					worst = max(worst, math.Abs(sum/losses[[2]int{c.Example, c.Index}]-1))
				}
			}
			d := distance(lora.Gradients, alone)
			t.Logf("%d tokens in %d segments, %d in separate rows; losses differ by up to %.2g, gradients by %.2g", computed, segments, tokens, worst, d)
			// Sums in another order, nothing else.
			if d > 1e-5 || worst > 1e-5 {
				t.Errorf("losses differ from those of separate rows by up to %g, gradients by %g", worst, d)
			}
			if test.share && test.limit > tokens && 2*computed > tokens {
				t.Errorf("%d of %d tokens are computed, expected less than half", computed, tokens)
			}
		})
	}
}

// What rows have in common is computed once from a tenth of the tokens on, without dropout, or where it is asked for.
func TestWhenPrefixesAreShared(t *testing.T) {
	decide := func(common int, dropout float64, wanted *bool) (shares bool, saved float64) {
		config := tinyJob(t)
		var rows strings.Builder
		for i := range 32 {
			fmt.Fprintf(&rows, `{"text":"%s%s"}`+"\n", strings.Repeat("x", common), strings.Repeat(string(rune('a'+i%26)), 60+i))
		}
		if err := os.WriteFile(config.TrainingFile, []byte(rows.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		config.DryRun, config.ValidationFile = true, ""
		config.Options.LoraDropout, config.Options.PrefixSharing, config.Options.BatchSize = &dropout, wanted, ptr(8)
		events := runJob(t, config, 0)
		data := eventsOf(events, child.EventDataset)[0]
		return eventsOf(events, child.EventPlan)[0].Plan.PrefixSharing, float64(data.SharedTokens) / float64(data.TrainTokens)
	}
	below, above := 0, 0
	for common := 0; common <= 60; common += 4 {
		_, saved := decide(common, 0, ptr(true))
		got, _ := decide(common, 0, nil)
		if want := saved >= 0.1; got != want {
			t.Errorf("%.1f%% of the tokens are saved: sharing is %t, expected %t", 100*saved, got, want)
		}
		if got {
			above++
		} else {
			below++
		}
	}
	if below < 2 || above < 2 {
		t.Errorf("%d cases below a tenth and %d above: the test needs both", below, above)
	}
	if got, _ := decide(60, 0.05, nil); got {
		t.Error("shared with dropout without being asked for")
	}
	if got, _ := decide(60, 0.05, ptr(true)); !got {
		t.Error("not shared with dropout although asked for")
	}
	if got, _ := decide(60, 0, ptr(false)); got {
		t.Error("shared although turned off")
	}
}
