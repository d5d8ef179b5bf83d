package train

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/graph"
)

// sweepExamples are read, packed and evaluated together.
const sweepExamples = 64

// source reads the examples [from, to) of something to evaluate.
type source func(from, to int) ([]dataset.Example, error)

func fromDataset(d *dataset.Dataset) source {
	return func(from, to int) ([]dataset.Example, error) { return d.Examples(d.Sequence(), from, to) }
}

// withChoices adds to every row of data its choices, which another reading of the same file has found.
func withChoices(data, choices *dataset.Dataset) source {
	return func(from, to int) ([]dataset.Example, error) {
		examples, err := fromDataset(data)(from, to)
		if err != nil {
			return nil, err
		}
		alternatives, err := fromDataset(choices)(from, to)
		if err != nil {
			return nil, err
		}
		for i := range examples {
			examples[i].Candidates = append(examples[i].Candidates, alternatives[i].Candidates...)
			examples[i].Right = alternatives[i].Right
		}
		return examples, nil
	}
}

// sweep evaluates rows [from, rows) of a source in order, without dropout, and calls visit with the answers of
// sweepExamples rows at a time.
func (t *trainer) sweep(ctx context.Context, rows, from int, read source, adapter *graph.LoRA, visit func(examples []dataset.Example, block [][]answer) error) error {
	for at := from; at < rows; at += sweepExamples {
		examples, err := read(at, min(rows, at+sweepExamples))
		if err != nil {
			return err
		}
		block, err := t.answers(ctx, examples, adapter)
		for errors.Is(err, ggml.ErrMemory) {
			if err := t.halve(dataset.Pack(examples, t.microTokens(), t.plan.PrefixSharing)); err != nil {
				return err
			}
			block, err = t.answers(ctx, examples, adapter)
		}
		if err != nil {
			return err
		}
		if err := visit(examples, block); err != nil {
			return err
		}
	}
	return nil
}

// answers evaluates examples.
func (t *trainer) answers(ctx context.Context, examples []dataset.Example, adapter *graph.LoRA) ([][]answer, error) {
	var all [][]answer
	for _, m := range dataset.Pack(examples, t.microTokens(), t.plan.PrefixSharing) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		t.yield(ctx)
		r, err := t.model.Evaluate(m.Batch, adapter)
		if err != nil {
			return nil, err
		}
		eachExample(m, examples, r.Losses, r.Correct, func(_ dataset.Example, _ int, answers []answer) { all = append(all, answers) })
	}
	return all, nil
}

// evaluate measures the whole validation file, without dropout, and reports whether that ends the job early.
func (t *trainer) evaluate(ctx context.Context) (stop bool, err error) {
	began := time.Now()
	read, o := fromDataset(t.valid), t.validObjective
	if t.validChoices != nil {
		read, o = withChoices(t.valid, t.validChoices), supervisedChoice{}
	}
	t.beginEvaluation()
	var total scores
	done := 0
	err = t.sweep(ctx, t.valid.Rows, 0, read, t.lora, func(examples []dataset.Example, block [][]answer) error {
		for i, answers := range block {
			o.compare(examples[i], answers, &total)
		}
		done += len(examples)
		t.evaluatedRows(done)
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("evaluate after step %d: %w", t.step, err)
	}
	t.spent.evaluation += time.Since(began)
	t.evaluated = t.step
	t.endEvaluation(time.Since(began))
	if !finite(total.Loss) {
		return false, t.warn("The validation loss after step %d is not a number", t.step)
	}
	e := child.TrainerEvent{
		Type: child.EventEval, Step: t.step, TotalSteps: t.plan.TotalSteps, Epoch: t.epochs(t.step),
		ValidLoss: total.meanLoss(), ValidAccuracy: total.accuracy(),
	}
	metric := e.ValidLoss
	if total.Compared > 0 {
		share := total.Right / total.Compared
		e.ValidChoiceAccuracy = &share
	}
	switch {
	case t.plan.MetricForBestModel == "accuracy":
		metric = e.ValidAccuracy
	case t.plan.MetricForBestModel == "choice_accuracy" && e.ValidChoiceAccuracy != nil:
		metric = *e.ValidChoiceAccuracy
	}
	t.metric = &metric
	e.Best, stop = t.selection.evaluated(metric, t.step, t.plan)
	return stop, t.report(e)
}
