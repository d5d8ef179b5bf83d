package train

import (
	"math"

	"github.com/hone-llm/hone/internal/dataset"
)

// preference is direct preference optimisation, https://arxiv.org/abs/2305.18290, with the losses of TRL's DPOTrainer.
// Index 0 of policy and reference is the preferred answer.
//
//	sigmoid  the log-probabilities are sums over an answer's tokens
//	ipo      they are means, https://arxiv.org/abs/2310.12036
type preference struct {
	beta, smoothing float64
	ipo             bool
}

func (p preference) compare(policy, reference [2]float64) comparison {
	margin := (policy[0] - policy[1]) - (reference[0] - reference[1])
	var c comparison
	for i := range c.rewards {
		c.rewards[i] = p.beta * (policy[i] - reference[i])
	}
	c.right = c.rewards[0] > c.rewards[1]
	var slope float64 // of the loss with respect to the margin
	if p.ipo {
		d := margin - 1/(2*p.beta)
		c.loss, slope = d*d, 2*d
	} else {
		x := p.beta * margin
		c.loss = (1-p.smoothing)*softplus(-x) + p.smoothing*softplus(x)
		slope = p.beta * (sigmoid(x) - (1 - p.smoothing))
	}
	c.gradient = []float64{slope, -slope}
	return c
}

// softplus is log(1 + e^x), and sigmoid its derivative.
func softplus(x float64) float64 { return math.Max(x, 0) + math.Log1p(math.Exp(-math.Abs(x))) }

func sigmoid(x float64) float64 { return 1 / (1 + math.Exp(-x)) }

// preferences is the objective of a preference job over one dataset.
type preferences struct {
	preference
	reference references // of the dataset's rows
}

func (p preferences) compare(e dataset.Example, answers []answer, s *scores) []float64 {
	reference := p.reference[e.Row]
	lengths := [2]float64{1, 1}
	var policy, anchor [2]float64
	for i, a := range answers {
		if p.ipo {
			lengths[i] = a.weight
		}
		policy[i], anchor[i] = a.logProb/lengths[i], reference[i]/lengths[i]
	}
	c := p.preference.compare(policy, anchor)
	var rewards [2]float64 // of whole answers, as TRL's, whatever the loss
	for i := range rewards {
		rewards[i] = c.rewards[i] * lengths[i]
		c.gradient[i] /= lengths[i]
	}
	s.addComparison(c, rewards[0] > rewards[1])
	s.Chosen += rewards[0]
	s.Rejected += rewards[1]
	s.addTokens(answers[0])
	return c.gradient
}
