package train

import (
	"math"

	"github.com/hone-llm/hone/internal/dataset"
)

// choice trains the answer among the choices of a question: the probabilities of whole choices, normalised over them.
type choice struct{}

func (choice) compare(e dataset.Example, answers []answer, s *scores) []float64 {
	c := choose(logProbs(answers), e.Right)
	s.addComparison(c, c.right)
	s.addTokens(answers[e.Right])
	return c.gradient
}

// supervisedChoice evaluates examples whose first candidate is the row as it is trained, and whose others are the
// choices: Example.Right counts from the first of them.
type supervisedChoice struct{}

func (supervisedChoice) compare(e dataset.Example, answers []answer, s *scores) []float64 {
	supervised{}.compare(e, answers[:1], s)
	s.Compared++
	if choose(logProbs(answers[1:]), e.Right).right {
		s.Right++
	}
	return nil
}

func logProbs(answers []answer) []float64 {
	out := make([]float64, len(answers))
	for i, a := range answers {
		out[i] = a.logProb
	}
	return out
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
