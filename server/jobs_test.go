package server

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

func (r *rig) upload(t *testing.T) string {
	t.Helper()
	file, err := r.client().CreateFileBytes(t.Context(), openai.FileBytesRequest{
		Name: "train.jsonl", Purpose: openai.PurposeFineTune,
		Bytes: []byte(`{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}` + "\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return file.ID
}

func TestJobThroughGoOpenAI(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	client, file := r.client(), r.upload(t)
	created, err := client.CreateFineTuningJob(t.Context(), openai.FineTuningJobRequest{
		Model: "smol", TrainingFile: file, Suffix: "quiz", Hyperparameters: &openai.Hyperparameters{Epochs: 2, BatchSize: "auto"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if created.Object != "fine_tuning.job" || created.Status != "validating_files" || created.TrainingFile != file || created.Hyperparameters.Epochs != 2.0 ||
		created.Hyperparameters.BatchSize != "auto" || created.OrganizationID == "" {
		t.Errorf("created %+v", created)
	}
	if got, err := client.RetrieveFineTuningJob(t.Context(), created.ID); err != nil || got.ID != created.ID {
		t.Errorf("retrieved %+v, %v", got, err)
	}
	events, err := client.ListFineTuningJobEvents(t.Context(), created.ID)
	if err != nil || len(events.Data) != 2 || events.Data[1].Message != "Created fine-tuning job: "+created.ID {
		t.Errorf("events %+v, %v", events, err)
	}
	status, body := r.do(t, "GET", "/v1/fine_tuning/jobs/"+created.ID+"/events?limit=1", "")
	if status != 200 || !strings.Contains(body, `"has_more":true`) || !strings.Contains(body, `"type":"message","data":{}`) {
		t.Errorf("raw events: %d %s", status, body)
	}
	status, body = r.do(t, "DELETE", "/v1/files/"+file, "")
	wantError(t, "delete of a file in use", status, body, 409, "", "file_in_use", created.ID)
	if cancelled, err := client.CancelFineTuningJob(t.Context(), created.ID); err != nil || cancelled.Status != "cancelled" {
		t.Errorf("cancelled %+v, %v", cancelled, err)
	}
	status, body = r.do(t, "POST", "/v1/fine_tuning/jobs/"+created.ID+"/cancel", "")
	wantError(t, "second cancel", status, body, 409, "", "conflict", "cancelled")
	status, body = r.do(t, "GET", "/v1/fine_tuning/jobs?limit=5", "")
	if status != 200 || !strings.Contains(body, created.ID) || !strings.Contains(body, `"has_more":false`) {
		t.Errorf("list: %d %s", status, body)
	}
	if status, body = r.do(t, "GET", "/v1/fine_tuning/jobs/"+created.ID+"/checkpoints", ""); status != 200 ||
		body != `{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`+"\n" {
		t.Errorf("checkpoints: %d %s", status, body)
	}
	status, body = r.do(t, "GET", "/v1/fine_tuning/jobs?after=none", "")
	wantError(t, "unknown cursor", status, body, 400, "after", "", "none")
}

func TestJobRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := r.upload(t)
	for _, test := range []struct{ fields, param, message string }{
		{`"model":"none"`, "model", "does not exist"},
		{`"model":"ft:smol:local:a:b"`, "model", "only base models"},
		{`"training_file":"file-none"`, "training_file", "does not exist"},
		{`"training_file":7`, "training_file", "expected a string"},
		{`"validation_file":"file-none"`, "validation_file", "does not exist"},
		{`"suffix":"` + strings.Repeat("x", 65) + `"`, "suffix", "64"},
		{`"seed":-1`, "seed", "2147483647"},
		{`"hyperparameters":{"n_epochs":51}`, "hyperparameters.n_epochs", "1 to 50"},
		{`"hyperparameters":{"n_epochs":"many"}`, "hyperparameters.n_epochs", `expected "auto" or an integer`},
		{`"hyperparameters":{"batch_size":0}`, "hyperparameters.batch_size", "1 to 256"},
		{`"hyperparameters":{"learning_rate_multiplier":0}`, "hyperparameters.learning_rate_multiplier", "more than 0"},
		{`"hyperparameters":{"learning_rate_multiplier":1001}`, "hyperparameters.learning_rate_multiplier", "at most 1000"},
		{`"hyperparameters":{"learning_rate":1e-3}`, "hyperparameters.learning_rate", "its place is hone.learning_rate"},
		{`"hyperparameters":{"prompt_loss_weight":1}`, "hyperparameters.prompt_loss_weight", "is not a hyper-parameter; they are batch_size,"},
		{`"n_epochs":3`, "n_epochs", "its place is method.supervised.hyperparameters.n_epochs"},
		{`"batch_size":3`, "batch_size", "its place is method.supervised.hyperparameters.batch_size"},
		{`"r":8`, "r", "its place is hone.r"},
		{`"gradient_accumulation_steps":8`, "gradient_accumulation_steps", "its place is hone.gradient_accumulation_steps"},
		{`"method":{"type":"supervised","hyperparameters":{"n_epochs":1}}`, "method.hyperparameters", "its place is method.supervised.hyperparameters"},
		{`"method":{"type":"supervised","supervised":{"n_epochs":1}}`, "method.supervised.n_epochs", "its place is method.supervised.hyperparameters.n_epochs"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"epochs":1}}}`, "method.supervised.hyperparameters.epochs", "is not a hyper-parameter"},
		{`"hone":{"n_epochs":1}`, "hone.n_epochs", "its place is method.supervised.hyperparameters.n_epochs"},
		{`"method":{"type":"dpo"}`, "method.type", "dpo"},
		{`"method":{"type":"reinforcement"}`, "method.type", "not available"},
		{`"method":{}`, "method.type", "supervised"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":"x"}}}`, "method.supervised.hyperparameters.n_epochs", "auto"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":1}}},"hyperparameters":{"n_epochs":1}`, "hyperparameters", "twice"},
		{`"integrations":[{"type":"wandb"}]`, "integrations", "not available"},
		{`"metadata":{"a":1}`, "metadata.a", "expected a string"},
		{`"hone":[]`, "hone", "expected an object"},
		{`"hone":{"rank":8}`, "hone.rank", "not an option; the options are r, lora_alpha"},
		{`"hone":{"save_total_limit":2}`, "hone.save_total_limit", "not an option"},
		{`"hone":{"r":0}`, "hone.r", "1 to"},
		{`"hone":{"r":1.5}`, "hone.r", "expected an integer"},
		{`"hone":{"lora_dropout":1}`, "hone.lora_dropout", "less than 1"},
		{`"hone":{"learning_rate":"high"}`, "hone.learning_rate", `is "high", expected a number`},
		{`"hone":{"target_modules":["lm_head"]}`, "hone.target_modules", "q_proj"},
		{`"hone":{"target_modules":[]}`, "hone.target_modules", "all-linear"},
		{`"hone":{"lr_scheduler_type":"polynomial"}`, "hone.lr_scheduler_type", "cosine"},
		{`"hone":{"per_device_train_batch_size":2,"gradient_accumulation_steps":4,"batch_size":4}`, "hone.batch_size", "is 8"},
		{`"hone":{"gradient_accumulation_steps":-1}`, "hone.gradient_accumulation_steps", "expected an integer from 1"},
		{`"hone":{"learning_rate":1e-3},"hyperparameters":{"learning_rate_multiplier":2}`, "hone.learning_rate", "give one"},
		{`"hone":{"num_train_epochs":2},"hyperparameters":{"n_epochs":3}`, "hone.num_train_epochs", "give one"},
	} {
		body := `{` + test.fields
		for name, field := range map[string]string{`"model"`: `"model":"smol"`, `"training_file"`: `"training_file":"` + file + `"`} {
			if !strings.Contains(test.fields, name) {
				body += "," + field
			}
		}
		status, answer := r.do(t, "POST", "/v1/fine_tuning/jobs", body+"}")
		if status != 400 || !strings.Contains(answer, `"param":"`+test.param+`"`) || !strings.Contains(strings.ReplaceAll(answer, `\"`, `"`), test.message) {
			t.Errorf("%s: %d %s\nwant param %s, message with %s", test.fields, status, answer, test.param, test.message)
		}
	}
}

// TestJobSpec translates the first user's recipe.
func TestJobSpec(t *testing.T) {
	t.Parallel()
	var req wire.FineTuningJobRequest
	err := decodeJSON([]byte(`{"model":"m","training_file":"file-1","validation_file":"file-2","suffix":"s","seed":7,"metadata":{"a":"b"},"integrations":null,
		"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":3,"batch_size":"auto","learning_rate_multiplier":"auto"}}},
		"hone":{"r":8,"lora_alpha":16,"target_modules":["q_proj","v_proj"],"lora_dropout":0.05,"per_device_train_batch_size":2,"gradient_accumulation_steps":4,
		"num_train_epochs":3.0,"learning_rate":2e-4,"lr_scheduler_type":"cosine","warmup_ratio":0.03,"max_length":256,"max_steps":-1,"weight_decay":"auto","use_rslora":false}}`), &req)
	if err != nil {
		t.Fatal(err)
	}
	got, err := jobSpec(&req)
	if err != nil {
		t.Fatal(err)
	}
	want := finetune.Spec{
		Model: "m", TrainingFile: "file-1", ValidationFile: "file-2", Suffix: "s", Seed: new(int64(7)), Metadata: map[string]string{"a": "b"}, MethodType: "supervised",
		Requested: finetune.Hyperparameters{NEpochs: new(3)},
		Options: child.TrainOptions{
			R: new(8), LoraAlpha: new(16.0), LoraDropout: new(0.05), TargetModules: []string{"q_proj", "v_proj"}, BatchSize: new(8), NumTrainEpochs: new(3),
			LearningRate: new(2e-4), LRSchedulerType: new("cosine"), WarmupRatio: new(0.03), MaxLength: new(256), UseRSLoRA: new(false),
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	options, err := trainOptions([]byte(`{"target_modules":"all-linear"}`))
	if err != nil || len(options.TargetModules) != 1 || options.TargetModules[0] != "all-linear" {
		t.Errorf("all-linear: %+v, %v", options, err)
	}
}

// TestOptionNames finds an option that the trainer has and the API does not.
func TestOptionNames(t *testing.T) {
	t.Parallel()
	all, err := json.Marshal(child.TrainOptions{
		R: new(1), LoraAlpha: new(1.0), LoraDropout: new(1.0), UseRSLoRA: new(true), TargetModules: []string{""}, LearningRate: new(1.0), LearningRateMultiplier: new(1.0),
		NumTrainEpochs: new(1), BatchSize: new(1), WarmupRatio: new(1.0), WarmupSteps: new(1), LRSchedulerType: new(""), WeightDecay: new(1.0), AdamBeta1: new(1.0),
		AdamBeta2: new(1.0), AdamEpsilon: new(1.0), MaxGradNorm: new(1.0), MaxLength: new(1), MaxSteps: new(1), SaveMinutes: new(1.0), QuestionTemplate: new(""),
	})
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(all, &fields); err != nil {
		t.Fatal(err)
	}
	delete(fields, "learning_rate_multiplier") // OpenAI's place has it
	for _, name := range optionNames() {
		if name != "per_device_train_batch_size" && name != "gradient_accumulation_steps" && fields[name] == nil {
			t.Errorf("the trainer has no option %s", name)
		}
		delete(fields, name)
	}
	if len(fields) > 0 {
		t.Errorf("the API lacks %v", fields)
	}
}

func TestJobToWire(t *testing.T) {
	t.Parallel()
	running := &finetune.Job{
		ID: "ftjob-1", CreatedAt: 5, Model: "smol", Status: finetune.Running, TrainingFile: "file-1", Seed: 3, Attempt: 2, EstimatedFinish: 99, TrainedTokens: 10,
		Hyperparameters: finetune.Hyperparameters{NEpochs: new(2)}, Plan: &child.TrainPlan{R: 16},
		Progress: finetune.Progress{Step: 4, TotalSteps: 8, Fraction: 0.5, TokensPerSecond: 300, SecondsLeft: 60, TrainLoss: new(0.5)},
	}
	got, err := jobToWire(running)
	if err != nil {
		t.Fatal(err)
	}
	if got.Error != nil || got.FinishedAt != nil || got.TrainedTokens != nil || got.ResultFiles == nil || got.FineTunedModel != nil || *got.EstimatedFinish != 99 {
		t.Errorf("running job %+v", got)
	}
	if diff := cmp.Diff(&wire.FineTuningProgress{Step: 4, TotalSteps: 8, StepFraction: 0.5, TokensPerSecond: 300, SecondsLeft: 60, TrainLoss: new(0.5)}, got.Hone.Progress); diff != "" {
		t.Errorf("progress (-want +got)\n%s", diff)
	}
	failed := &finetune.Job{Status: finetune.Failed, FinishedAt: 9, Error: &finetune.JobError{Code: "invalid_training_file", Message: "line 3", Param: "training_file"}}
	if got, err = jobToWire(failed); err != nil || got.Error.Code != "invalid_training_file" || *got.Error.Param != "training_file" || *got.FinishedAt != 9 || got.Hone.Progress != nil {
		t.Errorf("failed job %+v, %v", got, err)
	}
}
