package train

import "math"

// comparison is an objective over the candidates of one example: it sees the log-probability of each candidate, in
// nats, and says what loss they come to and how that changes with each of them.
type comparison struct {
	loss     float64
	gradient []float64 // [candidates] derivative of loss with respect to each log-probability
	right    bool      // the example's own candidate comes first
	rewards  [2]float64
}

// choose is the cross entropy of a choice: softmax over the candidates' log-probabilities, where only these can be
// answered. For candidates of one token each it is the cross entropy over the logits of those tokens.
func choose(logProbs []float64, right int) comparison {
	best := 0
	for i, p := range logProbs {
		if p > logProbs[best] {
			best = i
		}
	}
	sum := 0.0
	for _, p := range logProbs {
		sum += math.Exp(p - logProbs[best])
	}
	c := comparison{loss: math.Log(sum) + logProbs[best] - logProbs[right], right: best == right}
	for i, p := range logProbs {
		g := math.Exp(p-logProbs[best]) / sum
		if i == right {
			g--
		}
		c.gradient = append(c.gradient, g)
	}
	return c
}

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
