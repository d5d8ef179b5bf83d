package train

import "github.com/hone-llm/hone/internal/child"

// selection follows the metric of a job's evaluations, as transformers' Trainer and its EarlyStoppingCallback do.
type selection struct {
	Best     *float64 `json:"best,omitempty"` // the metric of the best evaluation
	BestStep int      `json:"best_step,omitempty"`
	Patience int      `json:"patience,omitempty"` // evaluations in a row that were not better by more than the threshold
}

// better reports whether a metric is better than another by more than a threshold.
func better(metric, than, threshold float64, p child.TrainPlan) bool {
	if p.MetricForBestModel == "loss" {
		return than-metric > threshold
	}
	return metric-than > threshold
}

// evaluated takes the metric of an evaluation. A small improvement makes it the best one, but costs patience.
func (s *selection) evaluated(metric float64, step int, p child.TrainPlan) (best, stop bool) {
	if s.Best == nil || better(metric, *s.Best, p.EarlyStoppingThreshold, p) {
		s.Patience = 0
	} else {
		s.Patience++
	}
	if best = s.Best == nil || better(metric, *s.Best, 0, p); best {
		s.Best, s.BestStep = &metric, step
	}
	return best, p.EarlyStoppingPatience > 0 && s.Patience >= p.EarlyStoppingPatience
}

// checkpoint is a servable adapter on disk.
type checkpoint struct {
	Step   int      `json:"step"`
	Dir    string   `json:"dir"`              // absolute, of whichever attempt wrote it
	Metric *float64 `json:"metric,omitempty"` // of the evaluation at the same step
}

// bestCheckpoint is the index of the one with the best metric, the earliest of equals; -1 if none has one.
func bestCheckpoint(list []checkpoint, p child.TrainPlan) int {
	best := -1
	for i, c := range list {
		if c.Metric != nil && (best < 0 || better(*c.Metric, *list[best].Metric, 0, p)) {
			best = i
		}
	}
	return best
}

// prune splits a list, oldest first, into what save_total_limit keeps and what it gives up: the newest stay, and the best
// one. As in transformers, the newest and the best both stay even with a limit of 1.
func prune(list []checkpoint, p child.TrainPlan) (kept, removed []checkpoint) {
	best := bestCheckpoint(list, p)
	left := len(list) - p.SaveTotalLimit
	for i, c := range list {
		if left > 0 && i != best && i != len(list)-1 {
			removed = append(removed, c)
			left--
		} else {
			kept = append(kept, c)
		}
	}
	return kept, removed
}
