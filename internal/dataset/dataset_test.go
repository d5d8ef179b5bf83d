package dataset

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
)

func sized(lengths []int) *Dataset {
	d := new(Dataset)
	for _, n := range lengths {
		d.add(prompt.Row{Tokens: make([]engine.Token, n), Weights: make([]float32, n)}, 1<<20)
	}
	return d
}

// Whatever the lengths, packing keeps every row once and in order, and goes over the limit for a single row only.
func TestPackKeepsRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lengths := rapid.SliceOf(rapid.IntRange(1, 50)).Draw(t, "lengths")
		limit := rapid.IntRange(1, 100).Draw(t, "limit")
		d := sized(lengths)
		rows := d.Order(rapid.Int64().Draw(t, "seed"), 1)
		var packed []int
		for _, run := range d.Pack(rows, limit) {
			tokens := 0
			for _, r := range run {
				tokens += lengths[r]
			}
			if len(run) == 0 || len(run) > 1 && tokens > limit {
				t.Fatalf("run %v of %d tokens, limit %d", run, tokens, limit)
			}
			packed = append(packed, run...)
		}
		if !slices.Equal(packed, rows) {
			t.Fatalf("packed %v, expected %v", packed, rows)
		}
	})
}

func TestOrderDependsOnSeedAndEpochOnly(t *testing.T) {
	d := sized(make([]int, 100))
	first := d.Order(1, 0)
	if !slices.Equal(first, d.Order(1, 0)) {
		t.Error("the same seed and epoch give another order")
	}
	if slices.Equal(first, d.Order(1, 1)) || slices.Equal(first, d.Order(2, 0)) {
		t.Error("another seed or epoch gives the same order")
	}
	sorted := slices.Sorted(slices.Values(first))
	if !slices.Equal(sorted, d.Sequence()) {
		t.Errorf("not a permutation: %v", first)
	}
}

func TestLongRowsAreDroppedWhole(t *testing.T) {
	d := new(Dataset)
	for _, n := range []int{5, 11, 10} {
		d.add(prompt.Row{Tokens: make([]engine.Token, n), Weights: []float32{0, 1}}, 10)
	}
	if len(d.Rows) != 2 || d.Dropped != 1 || d.Tokens != 15 || d.Longest != 10 || d.Targets != 2 {
		t.Errorf("got %d rows, %d dropped, %d tokens, longest %d, %d targets", len(d.Rows), d.Dropped, d.Tokens, d.Longest, d.Targets)
	}
}
