package finetune

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Option is one key of a job's `hone` object, and one flag of `hone finetune create`.
type Option struct {
	Name string // as in PEFT's LoraConfig, Hugging Face's TrainingArguments and TRL's configurations
	Kind string // integer, number, boolean, string, strings, integers, object
	Help string // one line: meaning, values, and what "auto" is

	field int // of child.TrainOptions
}

// help says what each option is. A test finds an option that has none.
var help = map[string]string{
	"r":                           "rank of the adapter, 1 to 256 (auto: 16)",
	"lora_alpha":                  "the adapter is scaled by lora_alpha / r (auto: 2 r)",
	"lora_dropout":                "share of the adapter's inputs that are dropped in training, 0 to below 1 (auto: 0.05)",
	"use_rslora":                  "scale by lora_alpha / sqrt(r) instead (auto: false)",
	"target_modules":              "linear layers that are adapted: all-linear, or some of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj (auto: all)",
	"layers_to_transform":         "numbers of the layers that are adapted, from 0 (auto: all)",
	"init_lora_weights":           "true (Kaiming-uniform A, zero B) or gaussian (auto: true)",
	"learning_rate":               "highest learning rate (auto: by the model's size)",
	"learning_rate_multiplier":    "factor on the automatic learning rate, in place of learning_rate",
	"num_train_epochs":            "times that each row is trained on (auto: by the number of rows)",
	"max_steps":                   "end after so many optimizer steps; -1 for no bound (auto: no bound)",
	"batch_size":                  "rows of one optimizer step (auto: by the number of rows)",
	"per_device_train_batch_size": "with gradient_accumulation_steps: their product is batch_size",
	"gradient_accumulation_steps": "with per_device_train_batch_size: their product is batch_size; alone, it multiplies the automatic one",
	"warmup_ratio":                "share of the steps in which the rate rises from 0 (auto: 0.1)",
	"warmup_steps":                "the same as a number of steps",
	"lr_scheduler_type":           "cosine, linear, constant, constant_with_warmup or cosine_with_min_lr (auto: cosine)",
	"lr_scheduler_kwargs":         "of cosine_with_min_lr: min_lr, a rate, or min_lr_rate, a share of learning_rate",
	"weight_decay":                "AdamW's weight decay (auto: 0)",
	"adam_beta1":                  "AdamW's beta1 (auto: 0.9)",
	"adam_beta2":                  "AdamW's beta2 (auto: 0.999)",
	"adam_epsilon":                "AdamW's epsilon (auto: 1e-8)",
	"max_grad_norm":               "gradients are clipped to this norm; 0 never (auto: 1)",
	"max_length":                  "longest row in tokens (auto: the model's context, at most 2048)",
	"long_rows":                   "what to do with longer rows: drop, or truncate the left of the prompt; an answer is never cut (auto: drop)",
	"train_on_all":                "learn every token, not only what the assistant says (auto: false)",
	"prefix_sharing":              "compute the beginning that rows share once (auto: where it saves 10% of the tokens and there is no dropout)",
	"question_template":           "wording of a question, which is recorded for hone predict",
	"choices":                     "the possible last answers, 2 to 64: loss and accuracy are restricted to them",
	"beta":                        "DPO's beta, above 0 to 2 (auto: 0.1)",
	"loss_type":                   "DPO's loss: sigmoid or ipo (auto: sigmoid)",
	"label_smoothing":             "DPO's label smoothing, 0 to below 0.5 (auto: 0)",
	"eval_strategy":               "when to measure on the validation file: no, steps or epoch (auto: epoch)",
	"eval_steps":                  "with eval_strategy steps: optimizer steps between two evaluations",
	"save_strategy":               "when to make a checkpoint that can be served: no, steps or epoch (auto: epoch; with load_best_model_at_end as eval_strategy)",
	"save_steps":                  "with save_strategy steps: optimizer steps between two checkpoints",
	"save_total_limit":            "checkpoints that are kept, the best one among them (auto: 3)",
	"save_minutes":                "minutes between two states that the job can go on from (auto: 5)",
	"logging_steps":               "optimizer steps between two lines of the log (auto: 1)",
	"load_best_model_at_end":      "the tuned model is the best evaluated one, not the last (auto: false)",
	"metric_for_best_model":       "loss, accuracy, or choice_accuracy of jobs with choices or few different answers and of dpo (auto: loss)",
	"early_stopping_patience":     "end after so many evaluations without improvement (auto: never)",
	"early_stopping_threshold":    "what counts as an improvement is more than this (auto: 0)",
	"device":                      "auto, cpu or cuda (auto: a GPU if the job fits into it)",
	"memory":                      "layout of the frozen weights: exact, middle or low (auto: the best that fits)",
	"micro_batch_tokens":          "tokens that are computed at once (auto: 1024)",
}

// otherNames are what other tools, and OpenAI, call an option.
var otherNames = map[string]string{
	"alpha": "lora_alpha", "cutoff_len": "max_length", "dpo_beta": "beta", "dropout": "lora_dropout", "epochs": "num_train_epochs",
	"evaluation_strategy": "eval_strategy", "layers": "layers_to_transform", "lora_r": "r", "lr": "learning_rate", "max_seq_len": "max_length",
	"max_seq_length": "max_length", "min_lr": "lr_scheduler_kwargs", "modules": "target_modules", "n_epochs": "num_train_epochs", "pref_beta": "beta",
	"rank": "r", "rslora": "use_rslora", "scheduler": "lr_scheduler_type", "train_on_input": "train_on_all", "train_on_inputs": "train_on_all",
}

// options are the fields of child.TrainOptions, in their order.
var options = describeOptions()

func describeOptions() []Option {
	t := reflect.TypeFor[child.TrainOptions]()
	list := make([]Option, t.NumField())
	for i := range list {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		list[i] = Option{Name: name, Kind: kindOfField(t.Field(i).Type), Help: help[name], field: i}
	}
	return list
}

func kindOfField(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[*int]():
		return "integer"
	case reflect.TypeFor[*float64]():
		return "number"
	case reflect.TypeFor[*bool]():
		return "boolean"
	case reflect.TypeFor[*string]():
		return "string"
	case reflect.TypeFor[[]string]():
		return "strings"
	case reflect.TypeFor[[]int]():
		return "integers"
	}
	return "object"
}

// KnownOptions returns every option, in the order of child.TrainOptions. The caller may not change it.
func KnownOptions() []Option { return options }

// IsOption says whether there is an option of this name.
func IsOption(name string) bool { return findOption(name) != nil }

func findOption(name string) *Option {
	i := slices.IndexFunc(options, func(o Option) bool { return o.Name == name })
	if i < 0 {
		return nil
	}
	return &options[i]
}

// DecodeOptions decodes a job's `hone` object. "auto" and null leave an option to the trainer, as does -1 for max_steps. An
// unknown key and a wrong type are *InvalidError; ranges are for Jobs.Create to check.
func DecodeOptions(raw json.RawMessage) (child.TrainOptions, error) {
	var to child.TrainOptions
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return to, invalid("hone", "", "hone is %s, expected an object", shorten(raw))
	}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		option := findOption(key)
		if option == nil {
			return to, unknownOption(key)
		}
		value := bytes.TrimSpace(fields[key])
		if string(value) == "null" || string(value) == `"auto"` {
			continue
		}
		if err := option.decode(value, reflect.ValueOf(&to).Elem().Field(option.field)); err != nil {
			return to, invalid("hone."+key, "", "%s is %s, expected %v", key, shorten(value), err)
		}
	}
	if to.MaxSteps != nil && *to.MaxSteps == -1 { // HF's word for no bound
		to.MaxSteps = nil
	}
	return to, nil
}

// decode sets a field of child.TrainOptions. The error says what was expected.
func (o *Option) decode(raw json.RawMessage, field reflect.Value) error {
	switch to := field.Addr().Interface().(type) {
	case **int:
		n, err := wholeNumber(raw)
		if err != nil {
			return errors.New("an integer")
		}
		*to = &n
	case *[]string:
		var list wire.StringList // one string is a list too
		if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 {
			return errors.New("a list of strings")
		}
		*to = list
	case *[]int:
		var list []json.RawMessage
		if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 {
			return errors.New("a list of integers")
		}
		for _, item := range list {
			n, err := wholeNumber(item)
			if err != nil {
				return errors.New("a list of integers")
			}
			*to = append(*to, n)
		}
	case **child.MinimumRate:
		decoder := json.NewDecoder(bytes.NewReader(raw))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(to); err != nil {
			return errors.New(`{"min_lr": a rate} or {"min_lr_rate": a share of learning_rate}`)
		}
	case **string:
		if o.Name == "init_lora_weights" && string(raw) == "true" { // PEFT's default is no string
			*to = new("true")
			return nil
		}
		if err := json.Unmarshal(raw, to); err != nil {
			return errors.New("a string")
		}
	case **bool:
		if err := json.Unmarshal(raw, to); err != nil {
			return errors.New("true or false")
		}
	default:
		if err := json.Unmarshal(raw, to); err != nil {
			return errors.New("a number")
		}
	}
	return nil
}

// wholeNumber also takes 3.0: HF's num_train_epochs is a float.
func wholeNumber(raw json.RawMessage) (int, error) {
	var f float64
	if err := json.Unmarshal(raw, &f); err != nil {
		return 0, err
	}
	if f != math.Trunc(f) || math.Abs(f) > 1<<40 || string(raw) == "null" {
		return 0, fmt.Errorf("%s is not an integer", raw)
	}
	return int(f), nil
}

// shorten keeps a value that is quoted in a message readable.
func shorten(raw json.RawMessage) string {
	if len(raw) > 60 {
		return strings.ToValidUTF8(string(raw[:60]), "") + "..."
	}
	return string(raw)
}

func unknownOption(name string) *InvalidError {
	return invalid("hone."+name, "", "%.60q is not an option of hone; did you mean %s?", name, NearestOption(name))
}

// NearestOption is the option whose name is most like name.
func NearestOption(name string) string {
	if other, ok := otherNames[strings.ToLower(name)]; ok {
		return other
	}
	best, least := "", math.MaxInt
	for _, o := range options {
		if d := editDistance(name, o.Name); d < least {
			best, least = o.Name, d
		}
	}
	return best
}

// editDistance is Levenshtein's, in bytes; only the beginning of a long name counts.
func editDistance(a, b string) int {
	a = a[:min(len(a), 64)]
	row := make([]int, len(b)+1)
	for i := range row {
		row[i] = i
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, diagonal+1, row[j]+1)
		}
	}
	return row[len(b)]
}
