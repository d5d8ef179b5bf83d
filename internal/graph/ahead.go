package graph

import "github.com/hone-llm/hone/internal/engine"

// ahead is the step of a micro-batch that is to come. It is made while the one before is computed: the host takes
// milliseconds for it, in which a GPU would wait.
type ahead struct {
	next func() (engine.Batch, bool)
	lora *LoRA
	// scale is Gradients'
	scale float32

	done chan struct{} // closed once step is made
	step *step         // or none
}

// Ahead says what the Gradients after the next one will be called with. next is called on another goroutine while
// that next one is computed, may wait there, and says false if there is nothing to come. Nothing depends on what it says:
// what is not asked for is thrown away.
func (m *Model) Ahead(lora *LoRA, scale float32, next func() (engine.Batch, bool)) {
	m.announced = &ahead{next: next, lora: lora, scale: scale, done: make(chan struct{})}
}

// beginAhead begins to make what was announced.
func (m *Model) beginAhead() {
	a := m.announced
	if a == nil {
		return
	}
	m.announced, m.ahead = nil, a
	go func() {
		defer close(a.done)
		b, ok := a.next()
		if !ok || b.Validate(m.Vocabulary) != nil {
			return
		}
		a.step, _ = m.makeStep(b, a.lora, true, a.scale, false) // an error comes again when the micro-batch does
	}()
}

// foreseen returns the step that was made ahead, if it is for this micro-batch.
func (m *Model) foreseen(b engine.Batch, lora *LoRA, scale float32) *step {
	a := m.ahead
	if a == nil {
		return nil
	}
	m.ahead = nil
	<-a.done
	if s := a.step; s != nil {
		if a.lora == lora && a.scale == scale && sameSlice(s.batch.Tokens, b.Tokens) && sameSlice(s.batch.Targets, b.Targets) &&
			sameSlice(s.batch.Segments, b.Segments) && sameSlice(s.batch.Seeds, b.Seeds) && (s.batch.Weigh == nil) == (b.Weigh == nil) {
			s.batch.Weigh = b.Weigh
			return s
		}
		s.free()
	}
	return nil
}

// dropAhead waits for what is being made and throws it away.
func (m *Model) dropAhead() {
	m.announced = nil
	if a := m.ahead; a != nil {
		m.ahead = nil
		<-a.done
		if a.step != nil {
			a.step.free()
		}
	}
}

// sameSlice says whether two slices are the same memory.
func sameSlice[T any](a, b []T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
