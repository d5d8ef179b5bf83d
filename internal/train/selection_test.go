package train

import (
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/child"
)

// The counter, the best metric and the stop are those of transformers 5.23's EarlyStoppingCallback with the Trainer's own
// bookkeeping of the best metric, printed for each list of metrics by
//
//	for m in metrics: callback.check_metric_value(args, state, control, m); stop = callback.early_stopping_patience_counter >= patience
//	    if state.best_metric is None or operator(m, state.best_metric): state.best_metric = m
func TestEarlyStoppingIsTransformers(t *testing.T) {
	for _, c := range []struct {
		name      string
		metric    string
		threshold float64
		values    []float64
		patience  []int // after each evaluation
		best      []bool
		stop      int // index of the evaluation that stops with a patience of 2; -1: none
	}{
		{"loss", "loss", 0, []float64{1, 0.9, 0.95, 0.8, 0.8, 0.81}, []int{0, 0, 1, 0, 1, 2}, []bool{true, true, false, true, false, false}, 5},
		{"threshold", "loss", 0.1, []float64{1, 0.95, 0.86, 0.7, 0.65}, []int{0, 1, 2, 0, 1}, []bool{true, true, true, true, true}, 2},
		{"accuracy", "accuracy", 0, []float64{0.5, 0.4, 0.6, 0.7}, []int{0, 1, 0, 0}, []bool{true, false, true, true}, -1},
	} {
		var s selection
		p := child.TrainPlan{MetricForBestModel: c.metric, EarlyStoppingThreshold: c.threshold, EarlyStoppingPatience: 2}
		stopped := -1
		for i, v := range c.values {
			best, stop := s.evaluated(v, i+1, p)
			if s.Patience != c.patience[i] || best != c.best[i] {
				t.Errorf("%s, evaluation %d: patience %d, best %t; expected %d, %t", c.name, i, s.Patience, best, c.patience[i], c.best[i])
			}
			if stop && stopped < 0 {
				stopped = i
			}
		}
		if stopped != c.stop {
			t.Errorf("%s: stopped at evaluation %d, expected %d", c.name, stopped, c.stop)
		}
	}
}

func TestPruneKeepsTheBest(t *testing.T) {
	at := func(step int, loss float64) checkpoint { return checkpoint{Step: step, Metric: &loss} }
	for _, c := range []struct {
		list  []checkpoint
		limit int
		kept  []int
	}{
		{[]checkpoint{at(1, 3), at(2, 1), at(3, 2), at(4, 2)}, 2, []int{2, 4}},
		{[]checkpoint{at(1, 3), at(2, 1), at(3, 2), at(4, 2)}, 3, []int{2, 3, 4}},
		{[]checkpoint{at(1, 1), at(2, 2)}, 1, []int{1, 2}},
		{[]checkpoint{at(1, 2), at(2, 1)}, 1, []int{2}},
		{[]checkpoint{{Step: 1}, {Step: 2}, {Step: 3}}, 2, []int{2, 3}},
	} {
		kept, removed := prune(c.list, child.TrainPlan{MetricForBestModel: "loss", SaveTotalLimit: c.limit})
		var steps []int
		for _, k := range kept {
			steps = append(steps, k.Step)
		}
		if !slices.Equal(steps, c.kept) || len(kept)+len(removed) != len(c.list) {
			t.Errorf("limit %d of %+v: kept %v, expected %v", c.limit, c.list, steps, c.kept)
		}
	}
}
