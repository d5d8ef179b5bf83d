package llama

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
)

func newDecoder(t *testing.T, m *Model, o ContextOptions) *Decoder {
	t.Helper()
	o.Threads = 1
	d, err := NewDecoder(m, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// The decoder's outputs are the context's, for every kind of Want, and a shared prefix continues as a computed one.
func TestDecoderOutputs(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	tokens, err := m.Tokenize(text, false, true)
	if err != nil {
		t.Fatal(err)
	}
	c, b := newContext(t, m, ContextOptions{Tokens: 256, Sequences: 1})
	want := logits(t, c, b, tokens, 0, 0)

	d := newDecoder(t, m, ContextOptions{Tokens: 256, Sequences: 4, BatchTokens: 64})
	half := len(tokens) / 2
	must := func(parts ...engine.Part) {
		t.Helper()
		if err := d.Decode(parts); err != nil {
			t.Fatal(err)
		}
	}
	must(engine.Part{Sequence: 0, Tokens: tokens, Want: engine.WantAll}, engine.Part{Sequence: 1, Tokens: tokens, Want: engine.WantState})
	if got := slices.Clone(d.Output(0, len(tokens)-1)); far(got, want) {
		t.Error("the last token's logits differ from the context's")
	}
	for i := range tokens {
		if len(d.Output(0, i)) != d.Limits().Vocabulary || len(d.Output(1, i)) != d.Limits().Embedding {
			t.Fatalf("token %d has %d logits and %d elements of state, want %d and %d", i, len(d.Output(0, i)), len(d.Output(1, i)), d.Limits().Vocabulary, d.Limits().Embedding)
		}
	}
	if !d.Share(0, 2, half) || d.Share(0, 2, half) || d.Share(0, 3, len(tokens)+1) {
		t.Error("sharing half a sequence with an empty one, or too much, or with one that is not empty, is reported wrongly")
	}
	must(engine.Part{Sequence: 2, Position: half, Tokens: tokens[half:], Want: engine.WantLast})
	if far(d.Output(0, 0), want) {
		t.Error("after a shared prefix, the logits differ")
	}
	if err := d.Decode([]engine.Part{{Sequence: 2, Position: half, Tokens: tokens}}); err == nil {
		t.Error("a part that does not begin where its sequence ends was computed")
	}
}

// far tells whether logits differ by more than rounding; see TestSequences for how much they may.
func far(got, want []float32) bool {
	for i := range want {
		if !(math.Abs(float64(got[i]-want[i])) < 1) {
			return true
		}
	}
	return len(got) != len(want)
}

// Cells are counted as the library uses them, whatever is shared, cut, refused or aborted.
func TestDecoderCountsCells(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	const cells, sequences = 256, 6 // what llama.cpp rounds to
	d := newDecoder(t, m, ContextOptions{Tokens: cells, Sequences: sequences, BatchTokens: 64})
	random := rand.New(rand.NewPCG(1, 2))
	lengths := make([]int, sequences)
	refused := 0
	for range 300 {
		s, o := random.IntN(sequences), random.IntN(sequences)
		switch random.IntN(4) {
		case 0:
			n := random.IntN(lengths[s] + 1)
			if !d.Truncate(engine.Sequence(s), n) {
				t.Fatal("a sequence of a key-value cache could not be cut")
			}
			lengths[s] = n
		case 1:
			if s != o && lengths[o] == 0 && lengths[s] > 0 {
				n := 1 + random.IntN(lengths[s])
				if !d.Share(engine.Sequence(s), engine.Sequence(o), n) {
					t.Fatal("a prefix could not be shared")
				}
				lengths[o] = n
			}
		default:
			tokens := make([]engine.Token, 1+random.IntN(40))
			before := d.FreeTokens()
			err := d.Decode([]engine.Part{{Sequence: engine.Sequence(s), Position: lengths[s], Tokens: tokens}})
			switch {
			case err == nil:
				lengths[s] += len(tokens)
			case errors.Is(err, engine.ErrNoRoom):
				refused++
				if before >= len(tokens) || d.FreeTokens() != before {
					t.Fatalf("no room for %d tokens, of %d free before, %d after", len(tokens), before, d.FreeTokens())
				}
			default:
				t.Fatal(err)
			}
		}
		for s, n := range lengths {
			if got := d.context.SequenceTokens(s); got != n || len(d.held[s]) != n {
				t.Fatalf("sequence %d holds %d tokens by the library's count and %d by the decoder's, want %d", s, got, len(d.held[s]), n)
			}
		}
	}
	if refused == 0 {
		t.Error("the cache was never full, so that was not tested")
	}
	d.Abort()
	if err := d.Decode([]engine.Part{{Sequence: 0, Position: lengths[0], Tokens: []engine.Token{1}}}); !errors.Is(err, engine.ErrAborted) && !errors.Is(err, engine.ErrNoRoom) {
		t.Errorf("an aborted decode returned %v", err)
	}
	d.ResetAbort()
	for s := range sequences {
		d.Truncate(engine.Sequence(s), 0)
	}
	if got := d.FreeTokens(); got != cells {
		t.Errorf("%d cells are free of an empty cache, want %d", got, cells)
	}
}

// A batch that is computed in parts, with attention as the device can, has the logits of one that is computed at once.
func TestDecoderMicroBatches(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	tokens, err := m.Tokenize(text, false, true)
	if err != nil {
		t.Fatal(err)
	}
	parts := []engine.Part{{Sequence: 0, Tokens: tokens, Want: engine.WantAll}, {Sequence: 1, Tokens: tokens[1:], Want: engine.WantLast}}
	whole := newDecoder(t, m, ContextOptions{Tokens: 256, Sequences: 2, BatchTokens: 128})
	divided := newDecoder(t, m, ContextOptions{Tokens: 256, Sequences: 2, BatchTokens: 128, MicroBatchTokens: 7, Attention: AttentionAuto})
	for _, d := range []*Decoder{whole, divided} {
		if err := d.Decode(parts); err != nil {
			t.Fatal(err)
		}
	}
	for i := range tokens {
		if far(divided.Output(0, i), whole.Output(0, i)) {
			t.Errorf("the logits of token %d differ", i)
		}
	}
	if far(divided.Output(1, 0), whole.Output(1, 0)) {
		t.Error("the logits of the second sequence differ")
	}
	if err := divided.Decode([]engine.Part{{Sequence: 0, Position: len(tokens), Tokens: make([]engine.Token, 128)}}); err != nil {
		t.Fatal(err)
	}
	free := divided.FreeTokens()
	if err := divided.Decode([]engine.Part{{Sequence: 1, Position: len(tokens) - 1, Tokens: make([]engine.Token, 128)}}); !errors.Is(err, engine.ErrNoRoom) {
		t.Errorf("a batch without room: %v", err)
	}
	if divided.FreeTokens() != free {
		t.Error("a batch without room took some")
	}
}
