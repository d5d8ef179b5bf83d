package engine

import "fmt"

// Batch is a packed micro-batch of T tokens: a forest of segments, without padding. A row of a dataset is a segment of
// its own, or a path of segments where it shares its beginning with other rows, so that the shared part is computed
// once. A token attends to the tokens before it in its own segment and to all of the segments on the path to the root.
type Batch struct {
	Tokens   []Token   // [T]
	Segments []Segment // in order, covering all T tokens
	// Targets are the trained predictions, ordered by Position and then by Label. Several may ask for different labels
	// after one position: where rows part, and for the alternatives of a choice.
	Targets []Target
	// Seeds [T] choose the dropout masks: an equal seed gives an equal mask. nil turns dropout off.
	Seeds []uint32
	// Weigh, if not nil, is called once between the forward and the backward pass with the losses of the targets and
	// returns the weights [len(Targets)] to use in place of Target.Weight: the derivatives of an objective (DPO, a
	// choice) with respect to those losses. It may return an error, which ends the computation.
	Weigh func(losses []float32) ([]float32, error)
}

// Segment is tokens [Start, End) of a batch. Their positions go on where Parent, the index of an earlier segment,
// ends; -1 starts a row at position 0. An inner segment is not empty.
type Segment struct{ Start, End, Parent int }

// Target asks for Label after the token at index Position: its loss counts with Weight.
type Target struct {
	Position int // in [0, T)
	Label    Token
	Weight   float32
}

// Result holds one value for each of a batch's targets, in nats; Correct says whether the label was the most likely.
type Result struct {
	Losses  []float32
	Correct []bool
}

// Rows returns the segments of rows of the given lengths that share nothing.
func Rows(lengths ...int) []Segment {
	segments := make([]Segment, len(lengths))
	start := 0
	for i, n := range lengths {
		segments[i] = Segment{start, start + n, -1}
		start += n
	}
	return segments
}

// Positions returns each token's position in its row, [T].
func (b Batch) Positions() []int {
	positions := make([]int, len(b.Tokens))
	for _, s := range b.Segments {
		next := 0
		if s.Parent >= 0 {
			next = positions[b.Segments[s.Parent].End-1] + 1
		}
		for i := s.Start; i < s.End; i++ {
			positions[i] = next + i - s.Start
		}
	}
	return positions
}

// Validate reports what is wrong with a batch for a model of the given vocabulary, before an engine computes with it.
func (b Batch) Validate(vocabulary int) error {
	t := len(b.Tokens)
	end := 0
	for i, s := range b.Segments {
		if s.Start != end || s.End <= s.Start || s.End > t || s.Parent < -1 || s.Parent >= i {
			return fmt.Errorf("micro-batch: segment %d is %+v after token %d of %d", i, s, end, t)
		}
		end = s.End
	}
	if t == 0 || end != t {
		return fmt.Errorf("micro-batch: %d tokens, of which the segments cover %d", t, end)
	}
	if b.Seeds != nil && len(b.Seeds) != t {
		return fmt.Errorf("micro-batch: %d seeds for %d tokens", len(b.Seeds), t)
	}
	for _, token := range b.Tokens {
		if token < 0 || int(token) >= vocabulary {
			return fmt.Errorf("micro-batch: token %d is outside the vocabulary of %d", token, vocabulary)
		}
	}
	if len(b.Targets) == 0 {
		return fmt.Errorf("micro-batch: no targets")
	}
	for i, target := range b.Targets {
		if target.Position < 0 || target.Position >= t || target.Label < 0 || int(target.Label) >= vocabulary {
			return fmt.Errorf("micro-batch: target %+v of %d tokens", target, t)
		}
		if i > 0 {
			if last := b.Targets[i-1]; target.Position < last.Position || target.Position == last.Position && target.Label <= last.Label {
				return fmt.Errorf("micro-batch: target %+v after %+v: expected increasing positions and labels", target, last)
			}
		}
	}
	return nil
}
