package enginetest

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/reference"
)

// distance is |got - want| / |want|; NaN and missing elements are far away.
func distance(got, want []float32) float64 {
	if len(got) != len(want) {
		return math.Inf(1)
	}
	var difference, norm float64
	for i := range want {
		d := float64(got[i]) - float64(want[i])
		difference += d * d
		norm += float64(want[i]) * float64(want[i])
	}
	if difference == 0 {
		return 0
	}
	return math.Sqrt(difference / norm)
}

// within is false for NaN.
func within(x, bound float64) bool { return x <= bound }

type gradient map[reference.Site][2][]float32

// gradients returns the engine's gradients of one or several batches, from cleared ones.
func (s *suite) gradients(t *testing.T, scale float32, batches ...engine.Batch) gradient {
	t.Helper()
	s.Clear()
	for _, b := range batches {
		if _, err := s.Gradients(b, scale); err != nil {
			t.Fatal(err)
		}
	}
	return s.read()
}

func (s *suite) read() gradient {
	g := gradient{}
	for _, site := range s.adapter.Sites {
		a, b := s.Gradient(site)
		g[site] = [2][]float32{a, b}
	}
	return g
}

// expected returns the reference's gradients.
func (s *suite) expected(t *testing.T, scale float64, b engine.Batch) gradient {
	t.Helper()
	for _, p := range s.lora.Pairs {
		for _, m := range []reference.Matrix{p.GradA, p.GradB} {
			for _, row := range m {
				clear(row)
			}
		}
	}
	if _, err := s.model.Gradients(b, s.lora, scale); err != nil {
		t.Fatal(err)
	}
	g := gradient{}
	for site, p := range s.lora.Pairs {
		g[site] = [2][]float32{Flat(p.GradA), Flat(p.GradB)}
	}
	return g
}

// same compares every matrix of two gradients, and logs the largest error.
func (s *suite) same(t *testing.T, what string, got, want gradient) {
	t.Helper()
	worst := 0.0
	for _, site := range s.adapter.Sites {
		for i, name := range []string{"A", "B"} {
			e := distance(got[site][i], want[site][i])
			worst = max(worst, e)
			if !within(e, s.tolerance.Gradients) {
				t.Errorf("%s: gradient of %s of layer %d's %s differs by %.2g", what, name, site.Layer, site.Module, e)
			}
		}
	}
	t.Logf("%s: gradients differ by at most %.1e", what, worst)
}

// agrees compares with the reference over a forest of every kind of segment.
func (s *suite) agrees(t *testing.T) {
	b := Forest()
	s.setLikelyLabels(t, b)
	s.compare(t, b)
}

// largeBatch does so over more tokens and targets than are computed at a time.
func (s *suite) largeBatch(t *testing.T) { s.compare(t, large()) }

// setLikelyLabels makes some labels the most likely ones, which random labels never are.
func (s *suite) setLikelyLabels(t *testing.T, b engine.Batch) {
	t.Helper()
	p, err := s.model.Forward(b, s.lora)
	if err != nil {
		t.Fatal(err)
	}
	for i, target := range b.Targets {
		alone := (i == 0 || b.Targets[i-1].Position < target.Position) && (i+1 == len(b.Targets) || b.Targets[i+1].Position > target.Position)
		if alone && i%3 == 0 {
			b.Targets[i].Label = engine.Token(slices.Index(p.Logits[i], slices.Max(p.Logits[i])))
		}
	}
}

// compare compares everything that an engine returns with the reference.
func (s *suite) compare(t *testing.T, b engine.Batch) {
	t.Helper()
	want, err := s.model.Forward(b, s.lora)
	if err != nil {
		t.Fatal(err)
	}
	logits, err := s.Logits(b)
	if err != nil {
		t.Fatal(err)
	}
	worst, row := 0.0, -1
	for i, target := range b.Targets {
		if i > 0 && target.Position == b.Targets[i-1].Position {
			continue
		}
		if row++; row == len(logits) {
			t.Fatalf("%d rows of logits are too few", len(logits))
		}
		e := distance(logits[row], Flat(want.Logits[i:i+1]))
		worst = max(worst, e)
		if !within(e, s.tolerance.Values) {
			t.Fatalf("logits after token %d differ by %.2g", target.Position, e)
		}
	}
	if row+1 != len(logits) {
		t.Fatalf("%d rows of logits, expected %d", len(logits), row+1)
	}
	t.Logf("logits differ by at most %.1e", worst)
	result, err := s.Evaluate(b)
	s.checkResult(t, "Evaluate", b, want, result, err)
	s.Clear()
	result, err = s.Gradients(b, 0.25)
	s.checkResult(t, "Gradients", b, want, result, err)
	s.same(t, "against the reference", s.read(), s.expected(t, 0.25, b))
}

func (s *suite) checkResult(t *testing.T, name string, b engine.Batch, want *reference.Pass, got engine.Result, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if len(got.Losses) != len(b.Targets) || len(got.Correct) != len(b.Targets) {
		t.Fatalf("%s: %d losses and %d correct of %d targets", name, len(got.Losses), len(got.Correct), len(b.Targets))
	}
	for i, loss := range want.Losses {
		if e := math.Abs(float64(got.Losses[i])-loss) / max(1, loss); !within(e, s.tolerance.Values) {
			t.Fatalf("%s: loss of target %d is %g, expected %g", name, i, got.Losses[i], loss)
		}
		// Rounding may decide between a label and another that is as likely.
		if got.Correct[i] != want.Correct[i] && !tie(want.Logits[i], int(b.Targets[i].Label), s.tolerance.Values) {
			t.Errorf("%s: correct of target %d is %t, expected %t", name, i, got.Correct[i], want.Correct[i])
		}
	}
}

// tie says whether the label's logit and the largest of the others are within the tolerance of each other.
func tie(logits []float64, label int, tolerance float64) bool {
	other, norm := math.Inf(-1), 0.0
	for i, v := range logits {
		norm += v * v
		if i != label {
			other = max(other, v)
		}
	}
	return math.Abs(logits[label]-other) <= 2*tolerance*math.Sqrt(norm)
}

// packedRows: attention stays inside a row, and a batch of rows is the sum of its rows.
func (s *suite) packedRows(t *testing.T) {
	packed := Forest()
	packed.Segments = engine.Rows(4, 1, 33, 16, 10)
	var apart []engine.Batch
	for _, row := range packed.Segments {
		apart = append(apart, separate(packed, row))
	}
	s.same(t, "rows packed and apart", s.gradients(t, 1, packed), s.gradients(t, 1, apart...))
	s.sameLosses(t, packed, apart...)
}

// sharedSegments: a forest is the sum of rows that each repeat the path to a segment and have that segment's targets.
func (s *suite) sharedSegments(t *testing.T) {
	forest := Forest()
	forest.Seeds = nil // rows that share a prefix share its mask
	var apart []engine.Batch
	for _, segment := range forest.Segments {
		apart = append(apart, separate(forest, segment))
	}
	s.same(t, "segments shared and repeated", s.gradients(t, 1, forest), s.gradients(t, 1, apart...))
	s.sameLosses(t, forest, apart...)
}

// separate is the row that ends with a segment of b, with the segment's targets.
func separate(b engine.Batch, segment engine.Segment) engine.Batch {
	var row engine.Batch
	if segment.Parent >= 0 {
		row = separate(b, b.Segments[segment.Parent])
		row.Targets = nil
	}
	offset := len(row.Tokens) - segment.Start
	row.Tokens = append(row.Tokens, b.Tokens[segment.Start:segment.End]...)
	if b.Seeds != nil {
		row.Seeds = append(row.Seeds, b.Seeds[segment.Start:segment.End]...)
	}
	row.Segments = engine.Rows(len(row.Tokens))
	for _, target := range b.Targets {
		if target.Position >= segment.Start && target.Position < segment.End {
			target.Position += offset
			row.Targets = append(row.Targets, target)
		}
	}
	return row
}

func (s *suite) sameLosses(t *testing.T, together engine.Batch, apart ...engine.Batch) {
	t.Helper()
	want, err := s.Evaluate(together)
	if err != nil {
		t.Fatal(err)
	}
	var got []float32
	for _, b := range apart {
		result, err := s.Evaluate(b)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, result.Losses...)
	}
	if e := distance(got, want.Losses); !within(e, s.tolerance.Values) {
		t.Errorf("losses differ by %.2g", e)
	}
}

// weigh: an objective sees the losses once, between the passes, and its weights replace the targets'.
func (s *suite) weigh(t *testing.T) {
	b, _ := Preference(0.3)
	for i := range b.Targets {
		b.Targets[i].Weight = 1000 // not to be used
	}
	derivative := b.Weigh
	var seen, weights []float32
	calls := 0
	b.Weigh = func(losses []float32) ([]float32, error) {
		calls++
		seen = slices.Clone(losses)
		var err error
		weights, err = derivative(losses)
		return weights, err
	}
	s.Clear()
	result, err := s.Gradients(b, 2)
	if err != nil {
		t.Fatal(err)
	}
	if calls != 1 || !slices.Equal(seen, result.Losses) {
		t.Errorf("Weigh was called %d times with losses %v, expected once with %v", calls, seen, result.Losses)
	}
	got := s.read()
	if _, err := s.Evaluate(b); err != nil || calls != 1 {
		t.Errorf("Evaluate called Weigh (%v): it has no backward pass", err)
	}
	weighted := b
	weighted.Weigh = nil
	weighted.Targets = slices.Clone(b.Targets)
	for i := range weights {
		weighted.Targets[i].Weight = weights[i]
	}
	s.same(t, "weights from the objective and from the targets", got, s.gradients(t, 2, weighted))
	b.Weigh = derivative
	s.same(t, "against the reference", got, s.expected(t, 2, b))
}

// weighFails: an objective's error ends the computation, and so do weights that do not fit the targets.
func (s *suite) weighFails(t *testing.T) {
	b := Forest()
	reason := errors.New("no reference losses")
	b.Weigh = func([]float32) ([]float32, error) { return nil, reason }
	if _, err := s.Gradients(b, 1); !errors.Is(err, reason) {
		t.Errorf("the objective's error became %v", err)
	}
	b.Weigh = func(losses []float32) ([]float32, error) { return losses[1:], nil }
	if _, err := s.Gradients(b, 1); err == nil {
		t.Error("a weight is missing: no error")
	}
}

// smallGradients: a tiny learning signal does not vanish in the number types of the backward pass.
func (s *suite) smallGradients(t *testing.T) {
	const scale = 1e-9
	want := s.gradients(t, 1, Forest())
	for _, pair := range want {
		for _, m := range pair {
			for i := range m {
				m[i] *= scale
			}
		}
	}
	s.same(t, "scaled by 1e-9", s.gradients(t, scale, Forest()), want)
}

// accumulation: gradients add up.
func (s *suite) accumulation(t *testing.T) {
	s.same(t, "the same batch twice and of double scale", s.gradients(t, 1, Forest(), Forest()), s.gradients(t, 2, Forest()))
}

// zeroWeights: targets of weight 0 have losses and no gradients.
func (s *suite) zeroWeights(t *testing.T) {
	b := Forest()
	for i := range b.Targets {
		b.Targets[i].Weight = 0
	}
	for site, pair := range s.gradients(t, 1, b) {
		for _, m := range pair {
			if slices.ContainsFunc(m, func(v float32) bool { return v != 0 }) {
				t.Fatalf("%v has a gradient", site)
			}
		}
	}
	result, err := s.Evaluate(b)
	if err != nil || len(result.Losses) != len(b.Targets) || slices.Contains(result.Losses, 0) {
		t.Errorf("losses %v, %v", result.Losses, err)
	}
}

// newAdapter: with B = 0 the model is the base model; B has gradients, A has none.
func (s *suite) newAdapter(t *testing.T) {
	for _, site := range s.adapter.Sites {
		pair := s.lora.Pairs[site]
		for _, row := range pair.B {
			clear(row)
		}
		s.Set(site, Flat(pair.A), Flat(pair.B))
	}
	b := Forest()
	base, err := s.model.Forward(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	result, err := s.Evaluate(b)
	s.checkResult(t, "Evaluate", b, base, result, err)
	got := s.gradients(t, 1, b)
	s.same(t, "against the reference", got, s.expected(t, 1, b))
}

// refusedBatches: what is wrong with a batch is an error, and no gradient changes.
func (s *suite) refusedBatches(t *testing.T) {
	before := s.gradients(t, 1, Forest())
	for _, c := range []struct {
		name  string
		spoil func(b *engine.Batch)
	}{
		{"token outside the vocabulary", func(b *engine.Batch) { b.Tokens[3] = vocabulary }},
		{"negative token", func(b *engine.Batch) { b.Tokens[3] = -1 }},
		{"label outside the vocabulary", func(b *engine.Batch) { b.Targets = []engine.Target{{Position: 0, Label: vocabulary, Weight: 1}} }},
		{"negative label", func(b *engine.Batch) { b.Targets = []engine.Target{{Position: 0, Label: -1, Weight: 1}} }},
		{"position behind the end", func(b *engine.Batch) { b.Targets = []engine.Target{{Position: 64, Weight: 1}} }},
		{"positions out of order", func(b *engine.Batch) { b.Targets[0], b.Targets[5] = b.Targets[5], b.Targets[0] }},
		{"a target twice", func(b *engine.Batch) { b.Targets[1] = b.Targets[0] }},
		{"no targets", func(b *engine.Batch) { b.Targets = nil }},
		{"tokens in no segment", func(b *engine.Batch) { b.Segments = engine.Rows(4) }},
		{"segments behind the end", func(b *engine.Batch) { b.Segments = engine.Rows(65) }},
		{"an empty segment", func(b *engine.Batch) { b.Segments = engine.Rows(30, 0, 34) }},
		{"a later parent", func(b *engine.Batch) { b.Segments[2].Parent = 4 }},
		{"its own parent", func(b *engine.Batch) { b.Segments[2].Parent = 2 }},
		{"a parent of -2", func(b *engine.Batch) { b.Segments[0].Parent = -2 }},
		{"too few seeds", func(b *engine.Batch) { b.Seeds = b.Seeds[:2] }},
		{"nothing", func(b *engine.Batch) { *b = engine.Batch{} }},
	} {
		b := Forest()
		c.spoil(&b)
		if _, err := s.Gradients(b, 1); err == nil {
			t.Errorf("%s: Gradients gave no error", c.name)
		}
		if _, err := s.Evaluate(b); err == nil {
			t.Errorf("%s: Evaluate gave no error", c.name)
		}
		if _, err := s.Logits(b); err == nil {
			t.Errorf("%s: Logits gave no error", c.name)
		}
	}
	for site, pair := range s.read() {
		for i := range pair {
			if !slices.Equal(pair[i], before[site][i]) {
				t.Fatalf("a refused batch changed the gradient of %v", site)
			}
		}
	}
}
