package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/hone-llm/hone/finetune"
)

// addOptionFlags adds a flag for each option of a job's `hone` object: what a new option is called follows from its
// field, and its help from package finetune. Values go into the map under the options' names. Flags are found with _ as
// with -, and --n-epochs is OpenAI's name of --num-train-epochs.
func addOptionFlags(f *pflag.FlagSet, into map[string]json.RawMessage) {
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name = flagName(name); name == "n-epochs" {
			name = "num-train-epochs"
		}
		return pflag.NormalizedName(name)
	})
	for _, option := range finetune.KnownOptions() {
		flag := f.VarPF(&optionValue{option, into}, flagName(option.Name), "", option.Help)
		if option.Kind == "boolean" {
			flag.NoOptDefVal = "true"
		}
	}
}

func flagName(option string) string { return strings.ReplaceAll(option, "_", "-") }

// optionValue is the flag of one option.
type optionValue struct {
	option finetune.Option
	into   map[string]json.RawMessage
}

// String is the value that the help shows as the default: none, since the help text says what "auto" is.
func (v *optionValue) String() string { return "" }

// Type is what the help shows for the value.
func (v *optionValue) Type() string {
	switch v.option.Kind {
	case "strings":
		return "a,b,..."
	case "integers":
		return "0,1,..."
	case "object":
		return "key=number"
	}
	return v.option.Kind
}

// Set reads a value as the option's type: JSON, "auto", words separated by commas as a list, and key=number as an object.
func (v *optionValue) Set(text string) error {
	raw := json.RawMessage(text)
	kind := v.option.Kind
	var err error
	switch {
	case text == "auto":
		raw = json.RawMessage(`"auto"`)
	case kind == "string":
		raw, err = json.Marshal(text)
	case kind == "strings" && !strings.HasPrefix(text, "["):
		raw, err = json.Marshal(strings.Split(text, ","))
	case kind == "integers" && !strings.HasPrefix(text, "["):
		raw = json.RawMessage("[" + text + "]")
	case kind == "object" && !strings.HasPrefix(text, "{"):
		key, value, _ := strings.Cut(text, "=")
		raw, err = json.Marshal(map[string]json.RawMessage{key: json.RawMessage(value)})
	}
	if err != nil || !json.Valid(raw) {
		return fmt.Errorf("expected %s", v.expected())
	}
	one, err := json.Marshal(map[string]json.RawMessage{v.option.Name: raw})
	if err != nil {
		return err
	}
	if _, err := finetune.DecodeOptions(one); err != nil {
		return fmt.Errorf("expected %s", v.expected())
	}
	v.into[v.option.Name] = raw
	return nil
}

func (v *optionValue) expected() string {
	switch v.option.Kind {
	case "integer":
		return "an integer or auto"
	case "number":
		return "a number or auto"
	case "boolean":
		return "true, false or auto"
	case "strings":
		return "words separated by commas, or auto"
	case "integers":
		return "integers separated by commas, or auto"
	case "object":
		return "min_lr=NUMBER or min_lr_rate=NUMBER"
	}
	return "a text"
}

// checkOptions refuses what the server would refuse, before anything is uploaded.
func checkOptions(opts jobOptions) error {
	raw, err := json.Marshal(opts.hone)
	if err != nil {
		return err
	}
	options, err := finetune.DecodeOptions(raw)
	if err == nil && (opts.method == "" || opts.method == finetune.Supervised || opts.method == finetune.DPO) { // another is the server's to refuse
		method := opts.method
		if method == "" {
			method = finetune.Supervised
		}
		err = finetune.CheckOptions(&options, method, opts.validation != "")
	}
	var invalid *finetune.InvalidError
	if errors.As(err, &invalid) {
		name := strings.TrimPrefix(invalid.Param, "hone.")
		return usageError{fmt.Errorf("--%s: %s", flagName(name), invalid.Message)}
	}
	return err
}
