package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// option is one key of a job's `hone` object. Its name is PEFT's LoraConfig's or HF TrainingArguments'.
type option struct {
	name string
	set  func(raw json.RawMessage, to *child.TrainOptions) error
}

// options are all keys of the `hone` object. "auto" and null leave any of them to the trainer.
var options = []option{
	{"r", integer(func(o *child.TrainOptions) **int { return &o.R })},
	{"lora_alpha", value("a number", func(o *child.TrainOptions) **float64 { return &o.LoraAlpha })},
	{"lora_dropout", value("a number", func(o *child.TrainOptions) **float64 { return &o.LoraDropout })},
	{"use_rslora", value("true or false", func(o *child.TrainOptions) **bool { return &o.UseRSLoRA })},
	{"target_modules", targetModules},
	{"learning_rate", value("a number", func(o *child.TrainOptions) **float64 { return &o.LearningRate })},
	{"num_train_epochs", integer(func(o *child.TrainOptions) **int { return &o.NumTrainEpochs })},
	{"batch_size", integer(func(o *child.TrainOptions) **int { return &o.BatchSize })},
	{"per_device_train_batch_size", nil}, // with the next: their product is batch_size
	{"gradient_accumulation_steps", nil},
	{"warmup_ratio", value("a number", func(o *child.TrainOptions) **float64 { return &o.WarmupRatio })},
	{"warmup_steps", integer(func(o *child.TrainOptions) **int { return &o.WarmupSteps })},
	{"lr_scheduler_type", value("a string", func(o *child.TrainOptions) **string { return &o.LRSchedulerType })},
	{"weight_decay", value("a number", func(o *child.TrainOptions) **float64 { return &o.WeightDecay })},
	{"adam_beta1", value("a number", func(o *child.TrainOptions) **float64 { return &o.AdamBeta1 })},
	{"adam_beta2", value("a number", func(o *child.TrainOptions) **float64 { return &o.AdamBeta2 })},
	{"adam_epsilon", value("a number", func(o *child.TrainOptions) **float64 { return &o.AdamEpsilon })},
	{"max_grad_norm", value("a number", func(o *child.TrainOptions) **float64 { return &o.MaxGradNorm })},
	{"max_length", integer(func(o *child.TrainOptions) **int { return &o.MaxLength })},
	{"max_steps", maxSteps},
	{"save_minutes", value("a number", func(o *child.TrainOptions) **float64 { return &o.SaveMinutes })},
	{"question_template", value("a string", func(o *child.TrainOptions) **string { return &o.QuestionTemplate })},
}

// trainOptions decodes a job's `hone` object. A key that hone does not have is refused: it would be left out of account.
// Ranges are the jobs' to check.
func trainOptions(raw json.RawMessage) (child.TrainOptions, error) {
	var to child.TrainOptions
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return to, invalid("hone", "hone is %s, expected an object", kindOf(raw))
	}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		i := slices.IndexFunc(options, func(o option) bool { return o.name == key })
		if i < 0 && slices.Contains(hyperparameterNames, key) {
			return to, misplaced("hone."+key, key)
		}
		if i < 0 {
			return to, invalid("hone."+key, "hone.%s is not an option; the options are %s", key, strings.Join(optionNames(), ", "))
		}
		if options[i].set == nil || isNull(fields[key]) || string(fields[key]) == `"auto"` {
			continue
		}
		if err := options[i].set(fields[key], &to); err != nil {
			return to, invalid("hone."+key, "hone.%s is %s, expected %v", key, shorten(fields[key]), err)
		}
	}
	return to, batchSize(fields, &to)
}

// hyperparameterNames are OpenAI's three. batch_size is an option too.
var hyperparameterNames = []string{"batch_size", "learning_rate_multiplier", "n_epochs"}

// refuseMisplaced refuses a job's request in which something that changes the training stands where it would be left out
// of account: an option beside `hone`, a hyper-parameter beside its object, an unknown one within it.
func refuseMisplaced(fields map[string]json.RawMessage) error { return refuseMisplacedIn("", fields) }

// refuseMisplacedIn looks at the fields of the object whose path, with a dot at its end, is prefix.
func refuseMisplacedIn(prefix string, fields map[string]json.RawMessage) error {
	hyperparameters := prefix == "hyperparameters." || prefix == "method.supervised.hyperparameters."
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		path := prefix + key
		switch {
		case isNull(fields[key]), hyperparameters && slices.Contains(hyperparameterNames, key):
			continue
		case slices.Contains(hyperparameterNames, key), slices.Contains(optionNames(), key):
			return misplaced(path, key)
		case hyperparameters:
			return invalid(path, "%s is not a hyper-parameter; they are %s, and options of LoRA and of the trainer stand in the object hone",
				path, strings.Join(hyperparameterNames, ", "))
		case path == "method.hyperparameters":
			return invalid(path, "%s would be left out of account; its place is method.supervised.hyperparameters", path)
		case path == "hyperparameters", path == "method", path == "method.supervised", path == "method.supervised.hyperparameters":
			var inner map[string]json.RawMessage
			if json.Unmarshal(fields[key], &inner) != nil {
				continue // decode says what is wrong with it
			}
			if err := refuseMisplacedIn(path+".", inner); err != nil {
				return err
			}
		}
	}
	return nil
}

// misplaced says where the option or hyper-parameter called name, which stands at path, belongs.
func misplaced(path, name string) error {
	place := "hone"
	if slices.Contains(hyperparameterNames, name) {
		place = "method.supervised.hyperparameters"
	}
	return invalid(path, "%s would be left out of account; its place is %s.%s", path, place, name)
}

func optionNames() []string {
	names := make([]string, len(options))
	for i, o := range options {
		names[i] = o.name
	}
	return names
}

// batchSize multiplies HF Trainer's two fields into one: how examples are split for memory is the engine's own choice.
func batchSize(fields map[string]json.RawMessage, to *child.TrainOptions) error {
	product, given := 1, false
	for _, name := range []string{"per_device_train_batch_size", "gradient_accumulation_steps"} {
		raw, ok := fields[name]
		if !ok || isNull(raw) {
			continue
		}
		n, err := wholeNumber(raw)
		if err != nil || n < 1 || n > maxFactor {
			return invalid("hone."+name, "hone.%s is %s, expected an integer from 1 to %d", name, shorten(raw), maxFactor)
		}
		product, given = product*n, true
	}
	if !given {
		return nil
	}
	if to.BatchSize != nil && *to.BatchSize != product {
		return invalid("hone.batch_size", "hone.batch_size is %d, and per_device_train_batch_size times gradient_accumulation_steps is %d; send one", *to.BatchSize, product)
	}
	to.BatchSize = &product
	return nil
}

// maxFactor keeps the product of two from overflowing; the range of the product is smaller.
const maxFactor = 1 << 15

// value decodes a T; expected describes it.
func value[T any](expected string, field func(*child.TrainOptions) **T) func(json.RawMessage, *child.TrainOptions) error {
	return func(raw json.RawMessage, to *child.TrainOptions) error {
		v := new(T)
		if err := json.Unmarshal(raw, v); err != nil {
			return errors.New(expected)
		}
		*field(to) = v
		return nil
	}
}

// integer also takes 3.0: HF's num_train_epochs is a float.
func integer(field func(*child.TrainOptions) **int) func(json.RawMessage, *child.TrainOptions) error {
	return func(raw json.RawMessage, to *child.TrainOptions) error {
		n, err := wholeNumber(raw)
		if err != nil {
			return errors.New("an integer")
		}
		*field(to) = &n
		return nil
	}
}

func wholeNumber(raw json.RawMessage) (int, error) {
	var f float64
	if err := json.Unmarshal(raw, &f); err != nil {
		return 0, err
	}
	if f != math.Trunc(f) || math.Abs(f) > 1<<40 {
		return 0, fmt.Errorf("%v is not an integer", f)
	}
	return int(f), nil
}

// maxSteps takes HF's -1 for no bound.
func maxSteps(raw json.RawMessage, to *child.TrainOptions) error {
	n, err := wholeNumber(raw)
	if err != nil {
		return errors.New("an integer")
	}
	if n != -1 {
		to.MaxSteps = &n
	}
	return nil
}

// targetModules takes a list of projections, or one string: mostly all-linear.
func targetModules(raw json.RawMessage, to *child.TrainOptions) error {
	var list wire.StringList
	if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 {
		return errors.New(`"all-linear" or a list of names such as q_proj`)
	}
	to.TargetModules = list
	return nil
}

// shorten keeps a value that is quoted in a message readable.
func shorten(raw json.RawMessage) string {
	if len(raw) > 60 {
		return string(raw[:60]) + "..."
	}
	return string(raw)
}
