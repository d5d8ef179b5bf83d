package finetune

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/lora"
)

// projections are the linear layers that an adapter can be trained on, by PEFT's names.
var projections = []string{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

// Methods of tuning.
const (
	Supervised = "supervised" // learn the answers
	DPO        = "dpo"        // learn to prefer one of two answers
)

// check returns *InvalidError for the first thing in the spec that can never work, whatever files and models there are.
func (s *Spec) check() error {
	switch {
	case s.Model == "":
		return invalid("model", "", "model is missing; name a model of GET /v1/models")
	case s.TrainingFile == "":
		return invalid("training_file", "", "training_file is missing; upload a JSONL file to /v1/files with purpose fine-tune and give its id")
	case s.MethodType == "reinforcement":
		return invalid("method.type", "", "reinforcement is not available: hone has no graders; the methods are supervised and dpo")
	case s.MethodType != Supervised && s.MethodType != DPO:
		return invalid("method.type", "", "method %.40q does not exist; the methods are supervised and dpo", s.MethodType)
	case utf8.RuneCountInString(s.Suffix) > 64:
		return invalid("suffix", "", "suffix has %d characters; at most 64 are allowed", utf8.RuneCountInString(s.Suffix))
	case s.Seed != nil && (*s.Seed < 0 || *s.Seed > 1<<31-1):
		return invalid("seed", "", "seed is %d; expected 0 to %d", *s.Seed, 1<<31-1)
	case len(s.Metadata) > 16:
		return invalid("metadata", "", "metadata has %d pairs; at most 16 are allowed", len(s.Metadata))
	}
	for key, value := range s.Metadata {
		if utf8.RuneCountInString(key) > 64 || utf8.RuneCountInString(value) > 512 {
			return invalid("metadata", "", "metadata %.70q: a key has at most 64 characters and a value 512", key)
		}
	}
	if err := s.Requested.check(); err != nil {
		return err
	}
	if err := s.merge(); err != nil {
		return err
	}
	return CheckOptions(&s.Options, s.MethodType, s.ValidationFile != "")
}

func (h *Hyperparameters) check() error {
	if h.NEpochs != nil && (*h.NEpochs < 1 || *h.NEpochs > 50) {
		return invalid("hyperparameters.n_epochs", "", "n_epochs is %d; expected \"auto\" or 1 to 50", *h.NEpochs)
	}
	if h.BatchSize != nil && (*h.BatchSize < 1 || *h.BatchSize > 256) {
		return invalid("hyperparameters.batch_size", "", "batch_size is %d; expected \"auto\" or 1 to 256", *h.BatchSize)
	}
	if m := h.LearningRateMultiplier; m != nil && !inMultiplierRange(*m) {
		return invalid("hyperparameters.learning_rate_multiplier", "", "learning_rate_multiplier is %v; expected \"auto\" or %s", *m, multiplierRange)
	}
	if h.Beta != nil && !inBetaRange(*h.Beta) {
		return invalid("hyperparameters.beta", "", "beta is %v; expected \"auto\" or %s", *h.Beta, betaRange)
	}
	return nil
}

// maxMultiplier times the automatic learning rate, which is at most 1e-3, is the highest learning rate there is.
const (
	maxMultiplier   = 1000
	multiplierRange = "more than 0 and at most 1000"
	betaRange       = "more than 0 and at most 2"
)

func inMultiplierRange(m float64) bool { return m > 0 && m <= maxMultiplier }

func inBetaRange(beta float64) bool { return beta > 0 && beta <= 2 }

// merge fills what the options leave open with OpenAI's hyper-parameters.
func (s *Spec) merge() error {
	if err := fill(&s.Options.NumTrainEpochs, s.Requested.NEpochs, "num_train_epochs", "n_epochs"); err != nil {
		return err
	}
	if err := fill(&s.Options.BatchSize, s.Requested.BatchSize, "batch_size", "batch_size"); err != nil {
		return err
	}
	if err := fill(&s.Options.Beta, s.Requested.Beta, "beta", "beta"); err != nil {
		return err
	}
	return fill(&s.Options.LearningRateMultiplier, s.Requested.LearningRateMultiplier, "learning_rate_multiplier", "learning_rate_multiplier")
}

func fill[T comparable](option **T, requested *T, name, openai string) error {
	if requested == nil {
		return nil
	}
	if *option != nil && **option != *requested {
		return invalid("hone."+name, "", "hone.%s is %v and hyperparameters.%s is %v; give one of them", name, **option, openai, *requested)
	}
	*option = requested
	return nil
}

// checkShape refuses options that ask for another shape or scale than that of the adapter called name, which training goes
// on from. What is not asked for, the trainer takes from the adapter.
func checkShape(o *child.TrainOptions, name string, from lora.Settings) error {
	conflict := func(option string, value, has any) error {
		return invalid("hone."+option, "", "%s is %v, and %s, from which the job goes on, has %v; leave %s out", option, value, name, has, option)
	}
	layers := slices.Sorted(slices.Values(o.LayersToTransform))
	switch modules := expanded(o.TargetModules); {
	case o.R != nil && *o.R != from.R:
		return conflict("r", *o.R, from.R)
	case o.LoraAlpha != nil && *o.LoraAlpha != from.LoRAAlpha:
		return conflict("lora_alpha", *o.LoraAlpha, from.LoRAAlpha)
	case o.UseRSLoRA != nil && *o.UseRSLoRA != from.UseRSLoRA:
		return conflict("use_rslora", *o.UseRSLoRA, from.UseRSLoRA)
	case modules != nil && !slices.Equal(modules, expanded(from.TargetModules)):
		return conflict("target_modules", strings.Join(modules, ", "), strings.Join(from.TargetModules, ", "))
	case layers != nil && !slices.Equal(layers, slices.Sorted(slices.Values(from.LayersToTransform))):
		has := "all"
		if from.LayersToTransform != nil {
			has = fmt.Sprint(from.LayersToTransform)
		}
		return conflict("layers_to_transform", o.LayersToTransform, has)
	case o.InitLoraWeights != nil:
		return conflict("init_lora_weights", *o.InitLoraWeights, "weights already")
	}
	return nil
}

// expanded returns module names in the order of projections, with all-linear as what it stands for.
func expanded(modules []string) (names []string) {
	for _, name := range projections {
		if slices.Contains(modules, name) || slices.Contains(modules, "all-linear") {
			names = append(names, name)
		}
	}
	return names
}

// CheckOptions returns *InvalidError for the first option that is out of range, contradicts another, or would have no effect on a
// job of this method with or without a validation file. It reads per_device_train_batch_size times
// gradient_accumulation_steps as batch_size.
func CheckOptions(o *child.TrainOptions, method string, validation bool) error {
	c := &optionCheck{}
	c.adapter(o)
	c.optimisation(o)
	c.data(o)
	c.objective(o, method)
	c.evaluation(o, validation)
	c.oneOf("device", o.Device, "auto", "cpu", "cuda")
	c.oneOf("memory", o.Memory, "auto", "exact", "middle", "low")
	c.whole("micro_batch_tokens", o.MicroBatchTokens, 32, 1<<16)
	if c.err != nil { // a nil *InvalidError would be an error that is not nil
		return c.err
	}
	return nil
}

// optionCheck keeps the first refusal.
type optionCheck struct{ err *InvalidError }

func (c *optionCheck) refuse(name, format string, args ...any) {
	if c.err == nil {
		c.err = invalid("hone."+name, "", format, args...)
	}
}

func (c *optionCheck) whole(name string, value *int, low, high int) {
	if value != nil && (*value < low || *value > high) {
		c.refuse(name, "%s is %d; expected %d to %d", name, *value, low, high)
	}
}

// number takes the range as a function: NaN is in none, since every comparison with it is false.
func (c *optionCheck) number(name string, value *float64, ok func(float64) bool, expected string) {
	if value != nil && !ok(*value) {
		c.refuse(name, "%s is %v; expected %s", name, *value, expected)
	}
}

func (c *optionCheck) oneOf(name string, value *string, words ...string) {
	if value != nil && !slices.Contains(words, *value) {
		last := len(words) - 1
		c.refuse(name, "%s is %.60q; expected %s or %s", name, *value, strings.Join(words[:last], ", "), words[last])
	}
}

func positive(v float64) bool    { return v > 0 && v < 1e30 }
func notNegative(v float64) bool { return v >= 0 && v < 1e30 }
func belowOne(v float64) bool    { return v >= 0 && v < 1 }
func share(v float64) bool       { return v >= 0 && v <= 1 }

// duplicate returns an element that is in the list twice.
func duplicate[T comparable](list []T) (twice T, found bool) {
	for i, v := range list {
		if slices.Contains(list[:i], v) {
			return v, true
		}
	}
	return twice, false
}

func (c *optionCheck) adapter(o *child.TrainOptions) {
	c.whole("r", o.R, 1, 256)
	c.number("lora_alpha", o.LoraAlpha, positive, "more than 0")
	c.number("lora_dropout", o.LoraDropout, belowOne, "at least 0 and less than 1")
	for _, module := range o.TargetModules {
		if module != "all-linear" && !slices.Contains(projections, module) {
			c.refuse("target_modules", "target_modules has %.60q; expected all-linear or some of %s", module, strings.Join(projections, ", "))
		}
	}
	if twice, found := duplicate(o.TargetModules); found {
		c.refuse("target_modules", "target_modules has %s twice", twice)
	}
	for _, layer := range o.LayersToTransform {
		if layer < 0 {
			c.refuse("layers_to_transform", "layers_to_transform has %d; layers are numbered from 0", layer)
		}
	}
	if twice, found := duplicate(o.LayersToTransform); found {
		c.refuse("layers_to_transform", "layers_to_transform has %d twice", twice)
	}
	c.oneOf("init_lora_weights", o.InitLoraWeights, "true", "gaussian")
}

func (c *optionCheck) optimisation(o *child.TrainOptions) {
	c.number("learning_rate", o.LearningRate, func(v float64) bool { return v > 0 && v <= 1 }, "more than 0 and at most 1")
	c.number("learning_rate_multiplier", o.LearningRateMultiplier, inMultiplierRange, multiplierRange)
	if o.LearningRate != nil && o.LearningRateMultiplier != nil {
		c.refuse("learning_rate", "learning_rate and learning_rate_multiplier are both given; give one of them")
	}
	c.whole("num_train_epochs", o.NumTrainEpochs, 1, 1000)
	c.whole("max_steps", o.MaxSteps, 1, 1<<30)
	c.batchSize(o)
	c.number("warmup_ratio", o.WarmupRatio, share, "0 to 1")
	c.whole("warmup_steps", o.WarmupSteps, 0, 1<<30)
	if o.WarmupRatio != nil && o.WarmupSteps != nil && *o.WarmupRatio > 0 && *o.WarmupSteps > 0 {
		c.refuse("warmup_ratio", "warmup_ratio and warmup_steps are both given; give one of them")
	}
	c.oneOf("lr_scheduler_type", o.LRSchedulerType, "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr")
	withMinimum := o.LRSchedulerType != nil && *o.LRSchedulerType == "cosine_with_min_lr"
	switch k := o.LRSchedulerKwargs; {
	case k == nil && withMinimum:
		c.refuse("lr_scheduler_kwargs", `lr_scheduler_type is cosine_with_min_lr, which needs lr_scheduler_kwargs: {"min_lr": a rate} or {"min_lr_rate": a share}`)
	case k == nil:
	case !withMinimum:
		c.refuse("lr_scheduler_kwargs", "lr_scheduler_kwargs are of lr_scheduler_type cosine_with_min_lr, which is not given")
	case (k.MinLR == nil) == (k.MinLRRate == nil):
		c.refuse("lr_scheduler_kwargs", "lr_scheduler_kwargs has to have one of min_lr and min_lr_rate")
	case k.MinLR != nil && (!notNegative(*k.MinLR) || o.LearningRate != nil && *k.MinLR > *o.LearningRate || *k.MinLR > 1):
		c.refuse("lr_scheduler_kwargs", "lr_scheduler_kwargs.min_lr is %v; expected 0 to learning_rate", *k.MinLR)
	case k.MinLRRate != nil && !share(*k.MinLRRate):
		c.refuse("lr_scheduler_kwargs", "lr_scheduler_kwargs.min_lr_rate is %v; expected 0 to 1", *k.MinLRRate)
	}
	if o.LRSchedulerType != nil && *o.LRSchedulerType == "constant" {
		if o.WarmupSteps != nil && *o.WarmupSteps > 0 {
			c.refuse("warmup_steps", "lr_scheduler_type constant has no warm-up; say constant_with_warmup")
		}
		if o.WarmupRatio != nil && *o.WarmupRatio > 0 {
			c.refuse("warmup_ratio", "lr_scheduler_type constant has no warm-up; say constant_with_warmup")
		}
	}
	c.number("weight_decay", o.WeightDecay, notNegative, "at least 0")
	c.number("adam_beta1", o.AdamBeta1, belowOne, "at least 0 and less than 1")
	c.number("adam_beta2", o.AdamBeta2, belowOne, "at least 0 and less than 1")
	c.number("adam_epsilon", o.AdamEpsilon, positive, "more than 0")
	c.number("max_grad_norm", o.MaxGradNorm, notNegative, "at least 0")
}

// batchSize multiplies HF Trainer's two fields into one: how rows are split for memory is the engine's own choice.
func (c *optionCheck) batchSize(o *child.TrainOptions) {
	c.whole("batch_size", o.BatchSize, 1, maxBatchSize)
	c.whole("per_device_train_batch_size", o.PerDeviceBatchSize, 1, maxBatchSize)
	c.whole("gradient_accumulation_steps", o.GradientAccumulation, 1, maxBatchSize)
	if o.PerDeviceBatchSize == nil && o.GradientAccumulation != nil && o.BatchSize != nil {
		c.refuse("gradient_accumulation_steps", "batch_size counts the rows of a whole optimizer step; leave gradient_accumulation_steps out, "+
			"or give per_device_train_batch_size in place of batch_size")
	}
	if c.err != nil || o.PerDeviceBatchSize == nil { // steps alone multiply the automatic size
		return
	}
	product := *o.PerDeviceBatchSize
	if o.GradientAccumulation != nil {
		product *= *o.GradientAccumulation
	}
	switch {
	case o.BatchSize != nil && *o.BatchSize != product:
		c.refuse("batch_size", "batch_size is %d, and per_device_train_batch_size times gradient_accumulation_steps is %d; give one", *o.BatchSize, product)
	case product > maxBatchSize:
		c.refuse("gradient_accumulation_steps", "per_device_train_batch_size times gradient_accumulation_steps is %d; expected at most %d", product, maxBatchSize)
	}
	o.BatchSize = &product
}

const maxBatchSize = 4096

func (c *optionCheck) data(o *child.TrainOptions) {
	c.whole("max_length", o.MaxLength, 2, 1<<20)
	c.oneOf("long_rows", o.LongRows, "drop", "truncate")
	if o.QuestionTemplate != nil && len(*o.QuestionTemplate) > 64<<10 {
		c.refuse("question_template", "question_template has %d bytes; expected at most 64 KiB", len(*o.QuestionTemplate))
	}
}

func (c *optionCheck) objective(o *child.TrainOptions, method string) {
	all := o.TrainOnAll != nil && *o.TrainOnAll
	if o.Choices != nil {
		if len(o.Choices) < 2 || len(o.Choices) > 64 {
			c.refuse("choices", "choices has %d answers; expected 2 to 64", len(o.Choices))
		}
		for _, choice := range o.Choices {
			if choice == "" || strings.TrimSpace(choice) != choice {
				c.refuse("choices", "choices has %.60q; expected texts without white space around them", choice)
			}
		}
		if twice, found := duplicate(o.Choices); found {
			c.refuse("choices", "choices has %.60q twice", twice)
		}
		if all {
			c.refuse("choices", "choices restricts the loss to the answers, and train_on_all learns every token; give one of them")
		}
		if method == DPO {
			c.refuse("choices", "choices is an objective of its own; leave it out of a dpo job")
		}
	}
	c.number("beta", o.Beta, inBetaRange, betaRange)
	c.oneOf("loss_type", o.LossType, "sigmoid", "ipo")
	c.number("label_smoothing", o.LabelSmoothing, func(v float64) bool { return v >= 0 && v < 0.5 }, "at least 0 and less than 0.5")
	if method == DPO {
		if all {
			c.refuse("train_on_all", "train_on_all has no meaning in a dpo job, which compares answers")
		}
		if o.LabelSmoothing != nil && *o.LabelSmoothing > 0 && o.LossType != nil && *o.LossType == "ipo" {
			c.refuse("label_smoothing", "loss_type ipo has no label_smoothing")
		}
		return
	}
	for _, given := range []struct {
		name string
		yes  bool
	}{{"beta", o.Beta != nil}, {"loss_type", o.LossType != nil}, {"label_smoothing", o.LabelSmoothing != nil}} {
		if given.yes {
			c.refuse(given.name, "%s is of method dpo, and this job is %s", given.name, method)
		}
	}
}

func (c *optionCheck) evaluation(o *child.TrainOptions, validation bool) {
	c.every("eval", o.EvalStrategy, o.EvalSteps)
	c.every("save", o.SaveStrategy, o.SaveSteps)
	c.whole("save_total_limit", o.SaveTotalLimit, 1, 1000)
	c.number("save_minutes", o.SaveMinutes, positive, "more than 0")
	c.whole("logging_steps", o.LoggingSteps, 1, 1<<30)
	c.oneOf("metric_for_best_model", o.MetricForBestModel, "loss", "accuracy", "choice_accuracy")
	c.whole("early_stopping_patience", o.EarlyStoppingPatience, 1, 1<<30)
	c.number("early_stopping_threshold", o.EarlyStoppingThreshold, notNegative, "at least 0")
	if o.EarlyStoppingThreshold != nil && o.EarlyStoppingPatience == nil {
		c.refuse("early_stopping_threshold", "early_stopping_threshold has no effect without early_stopping_patience")
	}
	c.bestSaved(o)
	never := o.EvalStrategy != nil && *o.EvalStrategy == "no"
	for _, needs := range []struct {
		name string
		yes  bool
	}{
		{"eval_strategy", o.EvalStrategy != nil && !never},
		{"load_best_model_at_end", o.LoadBestModelAtEnd != nil && *o.LoadBestModelAtEnd},
		{"early_stopping_patience", o.EarlyStoppingPatience != nil},
		{"metric_for_best_model", o.MetricForBestModel != nil},
	} {
		switch {
		case !needs.yes:
		case never:
			c.refuse(needs.name, "%s needs evaluations, and eval_strategy is no", needs.name)
		case !validation:
			c.refuse(needs.name, "%s needs a validation_file to evaluate on", needs.name)
		}
	}
}

// bestSaved checks that each evaluation has a checkpoint that load_best_model_at_end can go back to.
func (c *optionCheck) bestSaved(o *child.TrainOptions) {
	if o.LoadBestModelAtEnd == nil || !*o.LoadBestModelAtEnd || o.SaveStrategy == nil {
		return // where nobody says when to save, it is with each evaluation
	}
	eval := "epoch"
	if o.EvalStrategy != nil {
		eval = *o.EvalStrategy
	}
	switch {
	case *o.SaveStrategy != eval:
		c.refuse("save_strategy", "save_strategy is %s and eval_strategy %s; load_best_model_at_end needs the same", *o.SaveStrategy, eval)
	case eval == "steps" && o.SaveSteps != nil && o.EvalSteps != nil && *o.SaveSteps%max(*o.EvalSteps, 1) != 0:
		c.refuse("save_steps", "save_steps is %d; load_best_model_at_end needs a multiple of eval_steps, which is %d", *o.SaveSteps, *o.EvalSteps)
	}
}

// every checks a strategy and its steps: eval_strategy and eval_steps, save_strategy and save_steps.
func (c *optionCheck) every(name string, strategy *string, steps *int) {
	c.oneOf(name+"_strategy", strategy, "no", "steps", "epoch")
	c.whole(name+"_steps", steps, 1, 1<<30)
	bySteps := strategy != nil && *strategy == "steps"
	if steps != nil && !bySteps {
		c.refuse(name+"_steps", "%s_steps is only of %s_strategy steps", name, name)
	}
	if steps == nil && bySteps {
		c.refuse(name+"_strategy", "%s_strategy is steps, which needs %s_steps", name, name)
	}
}
