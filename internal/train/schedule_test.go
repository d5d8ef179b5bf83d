package train

import (
	"math"
	"testing"
)

// The rates are those of transformers 5.23:
//
//	get_scheduler(kind, torch.optim.SGD([p], lr=1.0), num_warmup_steps=3, num_training_steps=12, scheduler_specific_kwargs=...)
func TestScheduleIsTransformers(t *testing.T) {
	for _, c := range []struct {
		kind    string
		minimum float64
		want    []float64
	}{
		{"cosine", 0, []float64{0, 0.333333, 0.666667, 1, 0.969846, 0.883022, 0.75, 0.586824, 0.413176, 0.25, 0.116978, 0.030154, 0}},
		{"linear", 0, []float64{0, 0.333333, 0.666667, 1, 0.888889, 0.777778, 0.666667, 0.555556, 0.444444, 0.333333, 0.222222, 0.111111, 0}},
		{"constant", 0, []float64{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
		{"constant_with_warmup", 0, []float64{0, 0.333333, 0.666667, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
		{"cosine_with_min_lr", 0.1, []float64{0, 0.333333, 0.666667, 1, 0.972862, 0.89472, 0.775, 0.628142, 0.471858, 0.325, 0.20528, 0.127138, 0.1}},
		{"cosine_with_min_lr", 0.25, []float64{0, 0.333333, 0.666667, 1, 0.977385, 0.912267, 0.8125, 0.690118, 0.559882, 0.4375, 0.337733, 0.272615, 0.25}},
	} {
		s := Schedule{Kind: c.kind, Peak: 1, Minimum: c.minimum, Warmup: 3, Total: 12}
		for step, want := range c.want {
			if got := s.Rate(step); math.Abs(got-want) > 1e-6 {
				t.Errorf("%s, minimum %g, step %d: %.6f, want %.6f", c.kind, c.minimum, step, got, want)
			}
		}
	}
}
