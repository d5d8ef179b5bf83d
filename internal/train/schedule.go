package train

import (
	"fmt"
	"math"
)

// Schedule is a learning rate over the steps of a job, as transformers' get_scheduler makes it.
type Schedule struct {
	Kind          string // one of Schedulers
	Peak          float64
	Minimum       float64 // of cosine_with_min_lr
	Warmup, Total int     // optimizer steps
}

// Schedulers are the values of Schedule.Kind. As in transformers, constant has no warm-up.
var Schedulers = []string{"cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"}

// Rate is the learning rate of the update after `done` finished steps: 0 for the first one if there is a warm-up.
func (s Schedule) Rate(done int) float64 {
	if done < s.Warmup && s.Kind != "constant" {
		return s.Peak * float64(done) / float64(max(1, s.Warmup))
	}
	progress := float64(done-s.Warmup) / float64(max(1, s.Total-s.Warmup))
	cosine := math.Max(0, 0.5*(1+math.Cos(math.Pi*progress)))
	switch s.Kind {
	case "cosine":
		return s.Peak * cosine
	case "cosine_with_min_lr":
		return s.Minimum + (s.Peak-s.Minimum)*cosine
	case "linear":
		return s.Peak * math.Max(0, 1-progress)
	case "constant", "constant_with_warmup":
		return s.Peak
	}
	panic(fmt.Sprintf("train: scheduler %q was not validated", s.Kind))
}
