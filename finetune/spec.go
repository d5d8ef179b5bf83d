package finetune

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/child"
)

// projections are the linear layers that an adapter can be trained on, by PEFT's names.
var projections = []string{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

// check returns *InvalidError for the first thing in the spec that can never work, whatever files and models there are.
func (s *Spec) check() error {
	switch {
	case s.Model == "":
		return invalid("model", "", "model is missing; name a base model of GET /v1/models")
	case strings.HasPrefix(s.Model, "ft:"):
		return invalid("model", "model_not_supported", "model %q is a fine-tuned model; only base models can be fine-tuned", s.Model)
	case s.TrainingFile == "":
		return invalid("training_file", "", "training_file is missing; upload a JSONL file to /v1/files with purpose fine-tune and give its id")
	case s.MethodType != "supervised":
		return invalid("method.type", "", "method %q is not supported; only supervised is", s.MethodType)
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
	return checkOptions(&s.Options)
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
	return nil
}

// maxMultiplier times the automatic learning rate, which is at most 1e-3, is the highest learning rate there is.
const (
	maxMultiplier   = 1000
	multiplierRange = "more than 0 and at most 1000"
)

func inMultiplierRange(m float64) bool { return m > 0 && m <= maxMultiplier }

// merge fills what the options leave open with OpenAI's hyper-parameters.
func (s *Spec) merge() error {
	if err := fill(&s.Options.NumTrainEpochs, s.Requested.NEpochs, "num_train_epochs", "n_epochs"); err != nil {
		return err
	}
	if err := fill(&s.Options.BatchSize, s.Requested.BatchSize, "batch_size", "batch_size"); err != nil {
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

// checkOptions checks the ranges of what was asked for by PEFT's and HF Trainer's names.
func checkOptions(o *child.TrainOptions) error {
	var err error
	refuse := func(name string, value any, expected string) {
		if err == nil {
			err = invalid("hone."+name, "", "%s is %v; expected %s", name, value, expected)
		}
	}
	whole := func(name string, value *int, low, high int) {
		if value != nil && (*value < low || *value > high) {
			refuse(name, *value, fmt.Sprintf("%d to %d", low, high))
		}
	}
	// NaN is in no range: every comparison with it is false.
	number := func(name string, value *float64, ok func(float64) bool, expected string) {
		if value != nil && !ok(*value) {
			refuse(name, *value, expected)
		}
	}
	positive := func(v float64) bool { return v > 0 && v < 1e30 }
	notNegative := func(v float64) bool { return v >= 0 && v < 1e30 }
	belowOne := func(v float64) bool { return v >= 0 && v < 1 }

	whole("r", o.R, 1, 256)
	number("lora_alpha", o.LoraAlpha, positive, "more than 0")
	number("lora_dropout", o.LoraDropout, belowOne, "at least 0 and less than 1")
	for _, module := range o.TargetModules {
		if module != "all-linear" && !slices.Contains(projections, module) {
			refuse("target_modules", module, "all-linear or some of "+strings.Join(projections, ", "))
		}
	}
	number("learning_rate", o.LearningRate, func(v float64) bool { return v > 0 && v <= 1 }, "more than 0 and at most 1")
	number("learning_rate_multiplier", o.LearningRateMultiplier, inMultiplierRange, multiplierRange)
	if err == nil && o.LearningRate != nil && o.LearningRateMultiplier != nil {
		err = invalid("hone.learning_rate", "", "learning_rate and learning_rate_multiplier are both given; give one of them")
	}
	whole("num_train_epochs", o.NumTrainEpochs, 1, 1000)
	whole("batch_size", o.BatchSize, 1, 1024)
	number("warmup_ratio", o.WarmupRatio, func(v float64) bool { return v >= 0 && v <= 1 }, "0 to 1")
	whole("warmup_steps", o.WarmupSteps, 0, 1<<30)
	if s := o.LRSchedulerType; s != nil && !slices.Contains([]string{"cosine", "linear", "constant"}, *s) {
		refuse("lr_scheduler_type", *s, "cosine, linear or constant")
	}
	number("weight_decay", o.WeightDecay, notNegative, "at least 0")
	number("adam_beta1", o.AdamBeta1, belowOne, "at least 0 and less than 1")
	number("adam_beta2", o.AdamBeta2, belowOne, "at least 0 and less than 1")
	number("adam_epsilon", o.AdamEpsilon, positive, "more than 0")
	number("max_grad_norm", o.MaxGradNorm, notNegative, "at least 0")
	whole("max_length", o.MaxLength, 2, 1<<20)
	whole("max_steps", o.MaxSteps, 1, 1<<30)
	number("save_minutes", o.SaveMinutes, positive, "more than 0")
	if o.QuestionTemplate != nil && len(*o.QuestionTemplate) > 64<<10 {
		refuse("question_template", fmt.Sprintf("%d bytes long", len(*o.QuestionTemplate)), "at most 64 KiB")
	}
	return err
}
