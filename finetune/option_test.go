package finetune

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/child"
)

// TestOptions finds an option without a help text, and a text without an option.
func TestOptions(t *testing.T) {
	t.Parallel()
	names := map[string]bool{}
	for _, o := range KnownOptions() {
		names[o.Name] = true
		if o.Name == "" || o.Help == "" || len(o.Help) > 130 {
			t.Errorf("option %q of kind %s: help %q", o.Name, o.Kind, o.Help)
		}
		if o.Kind == "object" && o.Name != "lr_scheduler_kwargs" {
			t.Errorf("option %s has a type that is not known", o.Name)
		}
	}
	for name := range help {
		if !names[name] {
			t.Errorf("there is no option %s", name)
		}
	}
	for other, name := range otherNames {
		if !names[name] || names[other] {
			t.Errorf("%s is said to mean %s", other, name)
		}
	}
}

// TestDecodeOptions gives every option a value, then none.
func TestDecodeOptions(t *testing.T) {
	t.Parallel()
	values := map[string]string{"integer": `7.0`, "number": `0.25`, "boolean": `true`, "string": `"x"`, "strings": `["a","b"]`, "integers": `[2,1]`, "object": `{"min_lr":0.5}`}
	object, auto := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	for _, o := range KnownOptions() {
		object[o.Name], auto[o.Name] = json.RawMessage(values[o.Kind]), json.RawMessage(`"auto"`)
	}
	raw, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeOptions(raw)
	if err != nil {
		t.Fatal(err)
	}
	for i := range reflect.TypeFor[child.TrainOptions]().NumField() {
		if reflect.ValueOf(got).Field(i).IsNil() {
			t.Errorf("%s was not decoded", KnownOptions()[i].Name)
		}
	}
	if *got.R != 7 || *got.LearningRate != 0.25 || !*got.TrainOnAll || *got.Device != "x" || got.Choices[1] != "b" || got.LayersToTransform[0] != 2 || *got.LRSchedulerKwargs.MinLR != 0.5 {
		t.Errorf("decoded %+v", got)
	}
	if raw, err = json.Marshal(auto); err != nil {
		t.Fatal(err)
	}
	if got, err = DecodeOptions(raw); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(child.TrainOptions{}, got); diff != "" {
		t.Errorf("auto (-want +got)\n%s", diff)
	}
	got, err = DecodeOptions([]byte(`{"r":null,"max_steps":-1,"target_modules":"all-linear","init_lora_weights":true}`))
	if diff := cmp.Diff(child.TrainOptions{TargetModules: []string{"all-linear"}, InitLoraWeights: new("true")}, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

func TestNearestOption(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"rank": "r", "Rank": "r", "lora-dropout": "lora_dropout", "learningrate": "learning_rate", "save_step": "save_steps", "choice": "choices", "n_epochs": "num_train_epochs",
	} {
		if got := NearestOption(name); got != want {
			t.Errorf("%s is like %s, want %s", name, got, want)
		}
	}
}
