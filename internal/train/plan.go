package train

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

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

// facts are what "auto" goes by besides the options.
type facts struct {
	Rows      int // training rows that are left
	Weights   int // of the model
	MaxLength int // MaxLength's
	Layers    int
	Valid     bool // there is a validation file
	// FewAnswers: the validation file's answers are few, so that the choice among them is measured.
	FewAnswers bool
	Method     string // supervised, dpo
	Seed       int64
	Start      *child.TrainPlan // R, LoraAlpha, UseRSLoRA, TargetModules and LayersToTransform of the adapter to continue from
}

// NewPlan decides every "auto":
//
//	r                       16, or that of the adapter to continue from
//	lora_alpha              2 r, or the adapter's
//	lora_dropout            0.05
//	target_modules          all seven, or the adapter's
//	init_lora_weights       true (A kaiming-uniform, B zero)
//	num_train_epochs        as many as show about 1,600 examples, 1 to 10 (AutoEpochs)
//	batch_size              a 32nd of the rows, 1 to 4, or to 8 from a billion weights on (AutoBatchSize)
//	learning_rate           1e-3 for 135 million weights, with 1/sqrt of their number down to 1e-4 (AutoLearningRate);
//	                        a tenth of it for DPO
//	lr_scheduler_type       cosine, with a warm-up over a tenth of the steps
//	weight_decay, betas, epsilon, max_grad_norm    0, 0.9, 0.999, 1e-8, 1
//	long_rows               drop
//	beta, loss_type         0.1, sigmoid, of DPO
//	eval_strategy           epoch if there is a validation file
//	save_strategy           epoch, or as eval_strategy with load_best_model_at_end; 3 checkpoints are kept, the best one among them
//	logging_steps           1
//	metric_for_best_model   loss
//	prefix_sharing          where it saves a tenth of the tokens and there is no dropout (trainer.sharePrefixes)
//	device                  the GPU with the most free memory, if the job fits into it, else the CPU
//	memory                  exact, or what else fits into the free memory, with a warning (settings)
//	micro_batch_tokens      1,024; 4,096 on a GPU; less with a warning where memory is short
//
// Errors are *OptionError.
func NewPlan(o child.TrainOptions, f facts) (child.TrainPlan, error) {
	p := child.TrainPlan{
		Method:                 cmp.Or(f.Method, methodSupervised),
		R:                      or(o.R, 16),
		LoraDropout:            or(o.LoraDropout, 0.05),
		UseRSLoRA:              or(o.UseRSLoRA, false),
		TargetModules:          o.TargetModules,
		LayersToTransform:      o.LayersToTransform,
		InitLoraWeights:        or(o.InitLoraWeights, "true"),
		NumTrainEpochs:         or(o.NumTrainEpochs, AutoEpochs(f.Rows)),
		LRScheduler:            or(o.LRSchedulerType, "cosine"),
		WeightDecay:            or(o.WeightDecay, 0),
		AdamBeta1:              or(o.AdamBeta1, 0.9),
		AdamBeta2:              or(o.AdamBeta2, 0.999),
		AdamEpsilon:            or(o.AdamEpsilon, 1e-8),
		MaxGradNorm:            or(o.MaxGradNorm, 1),
		Seed:                   f.Seed,
		MaxLength:              f.MaxLength,
		LongRows:               or(o.LongRows, "drop"),
		TrainOnAll:             or(o.TrainOnAll, false),
		Choices:                o.Choices,
		EvalStrategy:           or(o.EvalStrategy, "epoch"),
		EvalSteps:              or(o.EvalSteps, 0),
		SaveStrategy:           or(o.SaveStrategy, "epoch"),
		SaveSteps:              or(o.SaveSteps, 0),
		SaveTotalLimit:         or(o.SaveTotalLimit, 3),
		LoggingSteps:           or(o.LoggingSteps, 1),
		LoadBestModelAtEnd:     or(o.LoadBestModelAtEnd, false),
		MetricForBestModel:     or(o.MetricForBestModel, "loss"),
		EarlyStoppingPatience:  or(o.EarlyStoppingPatience, 0),
		EarlyStoppingThreshold: or(o.EarlyStoppingThreshold, 0),
	}
	p.LoraAlpha = or(o.LoraAlpha, 2*float64(p.R))
	if s := f.Start; s != nil {
		if err := continues(o, *s); err != nil {
			return p, err
		}
		p.R, p.LoraAlpha, p.UseRSLoRA, p.TargetModules, p.LayersToTransform = s.R, s.LoraAlpha, s.UseRSLoRA, s.TargetModules, s.LayersToTransform
	}
	if !f.Valid {
		if or(o.EvalStrategy, "no") != "no" {
			return p, &OptionError{"eval_strategy", fmt.Sprintf("%q needs a validation file", p.EvalStrategy)}
		}
		p.EvalStrategy = "no"
	}
	if o.SaveStrategy == nil && p.LoadBestModelAtEnd && p.EvalStrategy == "steps" {
		p.SaveStrategy, p.SaveSteps = "steps", or(o.SaveSteps, p.EvalSteps)
	}
	if p.Method == methodDPO {
		p.Beta, p.LossType, p.LabelSmoothing = or(o.Beta, 0.1), or(o.LossType, "sigmoid"), or(o.LabelSmoothing, 0)
	}
	if err := batchSize(&p, o, f); err != nil {
		return p, err
	}
	if err := learningRate(&p, o, f); err != nil {
		return p, err
	}
	p.TargetModules = allLinear(p.TargetModules)
	if p.BatchSize > 0 && p.NumTrainEpochs > 0 {
		p.TotalSteps = p.NumTrainEpochs * stepsPerEpoch(f.Rows, p.BatchSize)
	}
	if o.MaxSteps != nil && *o.MaxSteps > 0 && p.BatchSize > 0 {
		p.TotalSteps = *o.MaxSteps // as HF's: overrides the epochs, repeating the data if needed
		p.NumTrainEpochs = (p.TotalSteps + stepsPerEpoch(f.Rows, p.BatchSize) - 1) / stepsPerEpoch(f.Rows, p.BatchSize)
	}
	// Rounded up, as HF's TrainingArguments.get_warmup_steps.
	p.WarmupSteps = int(math.Ceil(or(o.WarmupRatio, 0.1) * float64(p.TotalSteps)))
	if o.WarmupSteps != nil && *o.WarmupSteps > 0 {
		p.WarmupSteps = *o.WarmupSteps
	}
	return p, validate(p, o, f)
}

// allLinear spells out the names of all modules, for none or for "all-linear".
func allLinear(names []string) []string {
	if len(names) > 0 && !slices.Equal(names, []string{"all-linear"}) {
		return names
	}
	names = nil
	for _, m := range graph.AllLinear {
		names = append(names, m.String())
	}
	return names
}

// continues checks that options say nothing else than the adapter to continue from: its weights mean something only
// with the rank, scale and modules that it has.
func continues(o child.TrainOptions, s child.TrainPlan) error {
	same := func(a, b []string) bool {
		return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
	}
	for _, c := range []struct {
		other    bool
		option   string
		has, got any
	}{
		{o.R != nil && *o.R != s.R, "r", s.R, or(o.R, 0)},
		{o.LoraAlpha != nil && *o.LoraAlpha != s.LoraAlpha, "lora_alpha", s.LoraAlpha, or(o.LoraAlpha, 0)},
		{o.UseRSLoRA != nil && *o.UseRSLoRA != s.UseRSLoRA, "use_rslora", s.UseRSLoRA, or(o.UseRSLoRA, false)},
		{len(o.TargetModules) > 0 && !same(allLinear(o.TargetModules), s.TargetModules), "target_modules", s.TargetModules, o.TargetModules},
		{len(o.LayersToTransform) > 0 && !slices.Equal(slices.Sorted(slices.Values(o.LayersToTransform)), s.LayersToTransform), "layers_to_transform", s.LayersToTransform, o.LayersToTransform},
		{o.InitLoraWeights != nil, "init_lora_weights", "weights", or(o.InitLoraWeights, "")},
	} {
		if c.other {
			return &OptionError{c.option, fmt.Sprintf("%v, but the adapter to continue from has %v: leave this out", c.got, c.has)}
		}
	}
	return nil
}

// batchSize is examples per optimizer step, however the options spell it.
func batchSize(p *child.TrainPlan, o child.TrainOptions, f facts) error {
	p.BatchSize = or(o.BatchSize, AutoBatchSize(f.Rows, f.Weights))
	if o.PerDeviceBatchSize == nil && o.GradientAccumulation == nil {
		return nil
	}
	product := or(o.PerDeviceBatchSize, 1) * or(o.GradientAccumulation, 1)
	if o.PerDeviceBatchSize == nil {
		product = p.BatchSize * or(o.GradientAccumulation, 1)
		if o.BatchSize != nil {
			return &OptionError{"gradient_accumulation_steps", "batch_size counts the examples of a whole optimizer step: leave this out, or give per_device_train_batch_size in its place"}
		}
	}
	if o.BatchSize != nil && *o.BatchSize != product {
		return &OptionError{"batch_size", fmt.Sprintf("%d, but per_device_train_batch_size x gradient_accumulation_steps is %d: give one of them", *o.BatchSize, product)}
	}
	p.BatchSize = product
	return nil
}

func learningRate(p *child.TrainPlan, o child.TrainOptions, f facts) error {
	auto := AutoLearningRate(f.Weights)
	if p.Method == methodDPO {
		auto /= 10
	}
	p.LearningRateMultiplier = or(o.LearningRateMultiplier, 1)
	p.LearningRate = auto * p.LearningRateMultiplier
	if o.LearningRate != nil {
		if o.LearningRateMultiplier != nil {
			return &OptionError{"learning_rate", "give either this or learning_rate_multiplier"}
		}
		p.LearningRate = *o.LearningRate
		p.LearningRateMultiplier = p.LearningRate / auto
	}
	k := o.LRSchedulerKwargs
	if p.LRScheduler != "cosine_with_min_lr" {
		if k != nil {
			return &OptionError{"lr_scheduler_kwargs", "only cosine_with_min_lr takes some"}
		}
		return nil
	}
	if k == nil || (k.MinLR == nil) == (k.MinLRRate == nil) {
		return &OptionError{"lr_scheduler_kwargs", "cosine_with_min_lr needs exactly one of min_lr and min_lr_rate"}
	}
	p.MinLearningRate = or(k.MinLR, or(k.MinLRRate, 0)*p.LearningRate)
	return nil
}

var (
	strategies = []string{"no", "steps", "epoch"}
	metrics    = []string{"loss", "accuracy", "choice_accuracy"}
	devices    = []string{"auto", "cpu", "cuda"}
)

// validChoices reports whether choices can be told apart.
func validChoices(choices []string) bool {
	for i, c := range choices {
		if c == "" || strings.TrimSpace(c) != c || slices.Contains(choices[:i], c) {
			return false
		}
	}
	return len(choices) != 1
}

func validate(p child.TrainPlan, o child.TrainOptions, f facts) error {
	_, modules := modulesOf(p.TargetModules)
	evaluates := p.EvalStrategy != "no"
	for _, c := range []struct {
		bad              bool
		option, expected string
	}{
		{p.R < 1 || p.R > 256, "r", "1 to 256"},
		{!(p.LoraAlpha > 0), "lora_alpha", "more than 0"},
		{!(p.LoraDropout >= 0 && p.LoraDropout < 1), "lora_dropout", "at least 0 and less than 1"},
		{modules != nil, "target_modules", fmt.Sprint(modules)},
		{slices.ContainsFunc(p.LayersToTransform, func(i int) bool { return i < 0 || i >= f.Layers }), "layers_to_transform", fmt.Sprintf("layers from 0 to %d", f.Layers-1)},
		{p.InitLoraWeights != "true" && p.InitLoraWeights != "gaussian", "init_lora_weights", "true or gaussian"},
		{!(p.LearningRate > 0 && p.LearningRate <= 1), "learning_rate", "more than 0 and at most 1"},
		{!(p.MinLearningRate >= 0 && p.MinLearningRate <= p.LearningRate), "lr_scheduler_kwargs", "a minimum from 0 to the learning rate"},
		{p.NumTrainEpochs < 1, "num_train_epochs", "at least 1"},
		{p.BatchSize < 1, "batch_size", "at least 1"},
		{p.TotalSteps < 1, "max_steps", "at least 1"},
		{!(or(o.WarmupRatio, 0) >= 0 && or(o.WarmupRatio, 0) <= 1), "warmup_ratio", "0 to 1"},
		{or(o.WarmupSteps, 0) < 0, "warmup_steps", "at least 0"},
		{!slices.Contains(Schedulers, p.LRScheduler), "lr_scheduler_type", fmt.Sprintf("one of %v", Schedulers)},
		{!(p.WeightDecay >= 0), "weight_decay", "at least 0"},
		{!(p.AdamBeta1 >= 0 && p.AdamBeta1 < 1), "adam_beta1", "at least 0 and less than 1"},
		{!(p.AdamBeta2 >= 0 && p.AdamBeta2 < 1), "adam_beta2", "at least 0 and less than 1"},
		{!(p.AdamEpsilon > 0), "adam_epsilon", "more than 0"},
		{!(p.MaxGradNorm >= 0), "max_grad_norm", "at least 0"},
		{p.LongRows != "drop" && p.LongRows != "truncate", "long_rows", "drop or truncate"},
		{p.Method == methodDPO && len(p.Choices) > 0, "choices", "none in a dpo job, which compares the two answers of a row"},
		{!validChoices(p.Choices), "choices", "at least two different answers without white space around them"},
		{p.TrainOnAll && (p.Method == methodDPO || len(p.Choices) > 0), "train_on_all", "false where answers are compared: there is no loss on the prompt"},
		{p.Method != methodDPO && (o.Beta != nil || o.LossType != nil || o.LabelSmoothing != nil), "beta", "beta, loss_type and label_smoothing only in a dpo job"},
		{p.Method == methodDPO && !(p.Beta > 0), "beta", "more than 0"},
		{p.Method == methodDPO && p.LossType != "sigmoid" && p.LossType != "ipo", "loss_type", "sigmoid or ipo"},
		{!(p.LabelSmoothing >= 0 && p.LabelSmoothing < 0.5), "label_smoothing", "at least 0 and less than 0.5"},
		{!slices.Contains(strategies, p.EvalStrategy), "eval_strategy", fmt.Sprintf("one of %v", strategies)},
		{(p.EvalStrategy == "steps") != (p.EvalSteps > 0), "eval_steps", "at least 1 with eval_strategy steps, and only then"},
		{!slices.Contains(strategies, p.SaveStrategy), "save_strategy", fmt.Sprintf("one of %v", strategies)},
		{(p.SaveStrategy == "steps") != (p.SaveSteps > 0), "save_steps", "at least 1 with save_strategy steps, and only then"},
		{p.SaveTotalLimit < 1, "save_total_limit", "at least 1"},
		{p.LoggingSteps < 1, "logging_steps", "at least 1"},
		{p.LoadBestModelAtEnd && !evaluates, "load_best_model_at_end", "a validation file and evaluations"},
		{p.LoadBestModelAtEnd && (p.SaveStrategy != p.EvalStrategy || p.SaveStrategy == "steps" && p.SaveSteps%p.EvalSteps != 0), "save_strategy",
			"that of eval_strategy, and save_steps a multiple of eval_steps, with load_best_model_at_end"},
		{!slices.Contains(metrics, p.MetricForBestModel), "metric_for_best_model", fmt.Sprintf("one of %v", metrics)},
		{p.MetricForBestModel == "choice_accuracy" && p.Method != methodDPO && len(p.Choices) == 0 && !f.FewAnswers, "metric_for_best_model",
			"choice_accuracy only with choices, in a dpo job, or with at most 16 different answers"},
		{p.EarlyStoppingPatience < 0, "early_stopping_patience", "at least 1"},
		{p.EarlyStoppingPatience > 0 && !evaluates, "early_stopping_patience", "a validation file and evaluations"},
		{!(p.EarlyStoppingThreshold >= 0), "early_stopping_threshold", "at least 0"},
		{!(or(o.SaveMinutes, 0) >= 0), "save_minutes", "at least 0"},
		{!slices.Contains(devices, or(o.Device, "auto")), "device", fmt.Sprintf("one of %v", devices)},
		{o.Memory != nil && *o.Memory != "auto" && !slices.Contains(graph.LayoutNames, *o.Memory), "memory", fmt.Sprintf("auto or one of %v", graph.LayoutNames)},
		{o.MicroBatchTokens != nil && (*o.MicroBatchTokens < minMicroTokens || *o.MicroBatchTokens > 1<<16), "micro_batch_tokens", fmt.Sprintf("%d to %d", minMicroTokens, 1<<16)},
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
