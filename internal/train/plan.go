package train

import (
	"fmt"
	"math"
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/graph"
)

// AutoLearningRate is the rate of "auto" for a model of so many weights: 1e-3 for 135 million, falling with the square
// root of the size to 1.3e-4 for 8 billion, never under 1e-4. Measured on the example questions with the default model
// (RATIONALE.md): 1e-3 with 4 examples a step learned with every seed, 2e-3 with 8 with two of three, 2e-4 not at all.
func AutoLearningRate(weights int) float64 {
	rate := 1e-3 * math.Sqrt(135e6/float64(weights))
	return min(1e-3, max(1e-4, math.Round(rate*1e5)/1e5))
}

// AutoBatchSize is the "auto" number of examples per optimizer step: a 32nd of the rows, at least 1 and at most 4, or
// 8 for models of a billion weights and more. Small models sit on a plateau that steps, not examples, lead off.
func AutoBatchSize(rows, weights int) int {
	most := 4
	if weights >= 1e9 {
		most = 8
	}
	return min(most, max(1, rows/32))
}

// AutoEpochs is the "auto" number of epochs: as many as show about 1,600 examples, at least 1 and at most 10.
func AutoEpochs(rows int) int {
	return min(10, max(1, int(math.Round(1600/float64(rows)))))
}

// defaultMaxLength bounds the rows that "auto" trains on, in tokens.
const defaultMaxLength = 2048

// MaxLength is the longest row to train on, in tokens.
func MaxLength(o child.TrainOptions, shape graph.Shape) (int, error) {
	if o.MaxLength == nil {
		return min(defaultMaxLength, shape.ContextTokens), nil
	}
	if *o.MaxLength < 2 || *o.MaxLength > shape.ContextTokens {
		return 0, &OptionError{"max_length", fmt.Sprintf("%d: expected 2 to the model's context of %d tokens", *o.MaxLength, shape.ContextTokens)}
	}
	return *o.MaxLength, nil
}

// OptionError is an option that cannot be trained with, by the name that it has in a job's `hone` object.
type OptionError struct {
	Option, Reason string
}

func (e *OptionError) Error() string { return e.Option + ": " + e.Reason }

// NewPlan decides every "auto". rows counts the training rows that are left, weights the model's. Errors are *OptionError.
func NewPlan(o child.TrainOptions, rows, weights, maxLength int, seed int64) (child.TrainPlan, error) {
	p := child.TrainPlan{
		R:              or(o.R, 16),
		LoraDropout:    or(o.LoraDropout, 0.05),
		UseRSLoRA:      or(o.UseRSLoRA, false),
		NumTrainEpochs: or(o.NumTrainEpochs, AutoEpochs(rows)),
		BatchSize:      or(o.BatchSize, AutoBatchSize(rows, weights)),
		LRScheduler:    or(o.LRSchedulerType, "cosine"),
		WeightDecay:    or(o.WeightDecay, 0),
		AdamBeta1:      or(o.AdamBeta1, 0.9),
		AdamBeta2:      or(o.AdamBeta2, 0.999),
		AdamEpsilon:    or(o.AdamEpsilon, 1e-8),
		MaxGradNorm:    or(o.MaxGradNorm, 1),
		MaxLength:      maxLength,
		Seed:           seed,
	}
	p.LoraAlpha = or(o.LoraAlpha, 2*float64(p.R))
	auto := AutoLearningRate(weights)
	p.LearningRateMultiplier = or(o.LearningRateMultiplier, 1)
	p.LearningRate = auto * p.LearningRateMultiplier
	if o.LearningRate != nil {
		if o.LearningRateMultiplier != nil {
			return p, &OptionError{"learning_rate", "give either this or learning_rate_multiplier"}
		}
		p.LearningRate = *o.LearningRate
		p.LearningRateMultiplier = p.LearningRate / auto
	}
	targets := o.TargetModules
	if len(targets) == 0 || slices.Equal(targets, []string{"all-linear"}) {
		targets = nil
		for _, m := range graph.AllLinear {
			targets = append(targets, m.String())
		}
	}
	p.TargetModules = targets
	if p.BatchSize > 0 && p.NumTrainEpochs > 0 {
		p.TotalSteps = p.NumTrainEpochs * stepsPerEpoch(rows, p.BatchSize)
	}
	if o.MaxSteps != nil && *o.MaxSteps > 0 {
		p.TotalSteps = *o.MaxSteps // as HF's: overrides the epochs, repeating the data if needed
		p.NumTrainEpochs = (p.TotalSteps + stepsPerEpoch(rows, p.BatchSize) - 1) / stepsPerEpoch(rows, p.BatchSize)
	}
	// Rounded up, as HF's TrainingArguments.get_warmup_steps.
	p.WarmupSteps = int(math.Ceil(or(o.WarmupRatio, 0.1) * float64(p.TotalSteps)))
	if o.WarmupSteps != nil && *o.WarmupSteps > 0 {
		p.WarmupSteps = *o.WarmupSteps
	}
	return p, validate(p)
}

func validate(p child.TrainPlan) error {
	_, rates := modulesOf(p.TargetModules)
	for _, c := range []struct {
		bad              bool
		option, expected string
	}{
		{p.R < 1 || p.R > 256, "r", "1 to 256"},
		{!(p.LoraAlpha > 0), "lora_alpha", "more than 0"},
		{!(p.LoraDropout >= 0 && p.LoraDropout < 1), "lora_dropout", "at least 0 and less than 1"},
		{rates != nil, "target_modules", fmt.Sprint(rates)},
		{!(p.LearningRate > 0 && p.LearningRate <= 1), "learning_rate", "more than 0 and at most 1"},
		{p.NumTrainEpochs < 1, "num_train_epochs", "at least 1"},
		{p.BatchSize < 1, "batch_size", "at least 1"},
		{p.TotalSteps < 1, "max_steps", "at least 1"},
		{p.WarmupSteps < 0, "warmup_ratio", "0 to 1"},
		{!slices.Contains(Schedulers, p.LRScheduler), "lr_scheduler_type", fmt.Sprintf("one of %v", Schedulers)},
		{!(p.WeightDecay >= 0), "weight_decay", "at least 0"},
		{!(p.AdamBeta1 >= 0 && p.AdamBeta1 < 1), "adam_beta1", "at least 0 and less than 1"},
		{!(p.AdamBeta2 >= 0 && p.AdamBeta2 < 1), "adam_beta2", "at least 0 and less than 1"},
		{!(p.AdamEpsilon > 0), "adam_epsilon", "more than 0"},
		{!(p.MaxGradNorm >= 0), "max_grad_norm", "at least 0"},
	} {
		if c.bad {
			return &OptionError{c.option, "expected " + c.expected}
		}
	}
	return nil
}

// modulesOf parses target module names.
func modulesOf(names []string) ([]graph.Module, error) {
	var modules []graph.Module
	for _, name := range names {
		m, err := graph.ParseModule(name)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(modules, m) {
			modules = append(modules, m)
		}
	}
	return modules, nil
}

func stepsPerEpoch(rows, batchSize int) int { return (rows + batchSize - 1) / batchSize }

func or[T any](v *T, fallback T) T {
	if v == nil {
		return fallback
	}
	return *v
}
