package train

import (
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
)

// objective is what a job minimises, one example at a time.
type objective interface {
	// compare adds an example to the scores and returns the derivative of its loss with respect to the log-probability
	// of each answer. Without derivatives, the trained tokens count with the weights that they have.
	compare(e dataset.Example, answers []answer, s *scores) []float64
}

// answer is a candidate of an example after a pass through the model, all sums over its trained tokens.
type answer struct {
	logProb float64 // weighted, in nats
	weight  float64
	correct float64 // weight of the tokens that were the likeliest
}

// scores add up examples.
type scores struct {
	Loss    float64 // with Weight: of tokens, or of examples where an objective compares their answers
	Weight  float64
	Correct float64 // of Tokens
	Tokens  float64
	// Of jobs that compare answers: in how many Compared examples the right one came first, and DPO's rewards of the
	// preferred answers and of the others.
	Right, Compared  float64
	Chosen, Rejected float64
}

func (s *scores) meanLoss() float64 { return s.Loss / s.Weight }

// accuracy is the share of trained tokens that were the likeliest.
func (s *scores) accuracy() float64 {
	if s.Tokens == 0 {
		return 0
	}
	return s.Correct / s.Tokens
}

func (s *scores) addTokens(a answer) {
	s.Correct += a.correct
	s.Tokens += a.weight
}

func (s *scores) addComparison(c comparison, right bool) {
	s.Loss += c.loss
	s.Weight++
	s.Compared++
	if right {
		s.Right++
	}
}

// supervised is the cross entropy of each example's only answer, a mean over the trained tokens of a step.
type supervised struct{}

func (supervised) compare(_ dataset.Example, answers []answer, s *scores) []float64 {
	s.Loss -= answers[0].logProb
	s.Weight += answers[0].weight
	s.addTokens(answers[0])
	return nil
}

// eachExample calls visit with the answers of every example of a micro-batch, in order; examples are what Pack was given,
// correct may be nil.
func eachExample(m dataset.Micro, examples []dataset.Example, losses []float32, correct []bool, visit func(e dataset.Example, first int, answers []answer)) {
	for first := 0; first < len(m.Candidates); {
		example := m.Candidates[first].Example
		var answers []answer
		for i := first; i < len(m.Candidates) && m.Candidates[i].Example == example; i++ {
			var a answer
			c := m.Candidates[i]
			for k, target := range c.Targets {
				w := float64(c.Weights[k])
				a.logProb -= w * float64(losses[target])
				a.weight += w
				if correct != nil && correct[target] {
					a.correct += w
				}
			}
			answers = append(answers, a)
		}
		visit(examples[example], first, answers)
		first += len(answers)
	}
}

// score adds a computed micro-batch to the scores.
func score(o objective, m dataset.Micro, examples []dataset.Example, r engine.Result, s *scores) {
	eachExample(m, examples, r.Losses, r.Correct, func(e dataset.Example, _ int, answers []answer) { o.compare(e, answers, s) })
}

// weigh makes the micro-batch's Batch.Weigh: nil where the targets' own weights are the objective's.
func weigh(o objective, m dataset.Micro, examples []dataset.Example) func(losses []float32) ([]float32, error) {
	if _, ok := o.(supervised); ok {
		return nil
	}
	return func(losses []float32) ([]float32, error) {
		weights := make([]float32, len(losses))
		var aside scores
		eachExample(m, examples, losses, nil, func(e dataset.Example, first int, answers []answer) {
			for i, derivative := range o.compare(e, answers, &aside) {
				c := m.Candidates[first+i]
				for k, target := range c.Targets {
					weights[target] -= float32(derivative * float64(c.Weights[k]))
				}
			}
		})
		return weights, nil
	}
}

// comparison is what an objective over the candidates of one example comes to.
type comparison struct {
	loss     float64
	gradient []float64 // [candidates] derivative of loss with respect to each log-probability
	right    bool      // the example's own candidate comes first
	rewards  [2]float64
}
