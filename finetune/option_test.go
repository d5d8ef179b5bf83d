package finetune

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
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

var update = flag.Bool("update", false, "write docs/options.md anew")

// TestOptionsPage keeps the page of all options that of the code: go test ./finetune -run OptionsPage -update
func TestOptionsPage(t *testing.T) {
	t.Parallel()
	var page strings.Builder
	page.WriteString("# Options of a fine-tuning job\n\n" +
		"Keys of the object `hone` of `POST /v1/fine_tuning/jobs`, and flags of `hone finetune create` (with `-` for `_`). The names are those of\n" +
		"PEFT's LoraConfig, Hugging Face's TrainingArguments and TRL's DPOConfig. What is not given, null or \"auto\" is decided by the trainer;\n" +
		"`--dry-run`, or `POST /v1/fine_tuning/jobs/dry_run`, shows how. This page is made from the code by a test.\n\n| option | type | |\n| --- | --- | --- |\n")
	kinds := map[string]string{"strings": "list of strings", "integers": "list of integers"}
	for _, o := range KnownOptions() {
		kind := o.Kind
		if kinds[kind] != "" {
			kind = kinds[kind]
		}
		fmt.Fprintf(&page, "| `%s` | %s | %s |\n", o.Name, kind, o.Help)
	}
	const path = "../docs/options.md"
	if *update {
		if err := os.MkdirAll("../docs", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(page.String(), string(got)); diff != "" {
		t.Errorf("%s is not up to date; run this test with -update (-want +got)\n%s", path, diff)
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
