package server

import (
	"context"
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
		{`"model":"ft:smol:local:a:b"`, "model", "does not exist"},
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
		{`"hyperparameters":{"prompt_loss_weight":1}`, "hyperparameters.prompt_loss_weight", "is not a hyper-parameter; they are batch_size, beta,"},
		{`"n_epochs":3`, "n_epochs", "its place is method.supervised.hyperparameters.n_epochs"},
		{`"batch_size":3`, "batch_size", "its place is method.supervised.hyperparameters.batch_size"},
		{`"r":8`, "r", "its place is hone.r"},
		{`"gradient_accumulation_steps":8`, "gradient_accumulation_steps", "its place is hone.gradient_accumulation_steps"},
		{`"method":{"type":"supervised","hyperparameters":{"n_epochs":1}}`, "method.hyperparameters", "its place is method.supervised.hyperparameters"},
		{`"method":{"type":"supervised","supervised":{"n_epochs":1}}`, "method.supervised.n_epochs", "its place is method.supervised.hyperparameters.n_epochs"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"epochs":1}}}`, "method.supervised.hyperparameters.epochs", "is not a hyper-parameter"},
		{`"hone":{"n_epochs":1}`, "hone.n_epochs", "did you mean num_train_epochs?"},
		{`"method":{"type":"reinforcement","reinforcement":{"grader":{}}}`, "method.type", "reinforcement is not available"},
		{`"method":{"type":"orpo"}`, "method.type", "does not exist; the methods are supervised and dpo"},
		{`"method":{}`, "method.type", "supervised"},
		{`"method":{"type":"dpo","supervised":{}}`, "method.supervised", "method.type is dpo"},
		{`"method":{"type":"supervised","dpo":{}}`, "method.dpo", "method.type is supervised"},
		{`"method":{"type":"dpo","dpo":{"hyperparameters":{"beta":0}}}`, "hyperparameters.beta", "more than 0 and at most 2"},
		{`"method":{"type":"dpo","dpo":{"hyperparameters":{"beta":2.5}}}`, "hyperparameters.beta", "at most 2"},
		{`"method":{"type":"dpo","dpo":{"hyperparameters":{"beta":"low"}}}`, "method.dpo.hyperparameters.beta", `expected "auto" or a number`},
		{`"method":{"type":"dpo","dpo":{"beta":0.1}}`, "method.dpo.beta", "its place is method.dpo.hyperparameters.beta"},
		{`"method":{"type":"dpo","dpo":{"hyperparameters":{"loss_type":"ipo"}}}`, "method.dpo.hyperparameters.loss_type", "its place is hone.loss_type"},
		{`"method":{"type":"dpo","dpo":{"hyperparameters":{"beta":0.1}}},"hone":{"beta":0.2}`, "hone.beta", "give one"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"beta":0.1}}}`, "method.supervised.hyperparameters.beta", "its place is method.dpo.hyperparameters.beta"},
		{`"beta":0.1`, "beta", "its place is method.dpo.hyperparameters.beta"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":"x"}}}`, "method.supervised.hyperparameters.n_epochs", "auto"},
		{`"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":1}}},"hyperparameters":{"n_epochs":1}`, "hyperparameters", "twice"},
		{`"integrations":[{"type":"wandb","wandb":{"project":"p"}}]`, "integrations[0].type", `the integration "wandb" is not available`},
		{`"integrations":[{}]`, "integrations[0].type", "is missing"},
		{`"integrations":"wandb"`, "integrations", "expected a list of objects with a type, not a string"},
		{`"suffix":""`, "suffix", "suffix is empty; expected 1 to 64"},
		{`"validation_file":""`, "validation_file", "validation_file is empty"},
		{`"seed":2147483648`, "seed", "expected 0 to 2147483647"},
		{`"seed":1.5`, "seed", "expected an integer"},
		{`"hyperparameters":{"batch_size":257}`, "hyperparameters.batch_size", "1 to 256"},
		{`"hyperparameters":{"n_epochs":0}`, "hyperparameters.n_epochs", "1 to 50"},
		{`"metadata":{"` + strings.Repeat("k", 65) + `":"v"}`, "metadata", "at most 64 characters"},
		{`"metadata":{"k":"` + strings.Repeat("v", 513) + `"}`, "metadata", "a value 512"},
		{`"metadata":["a"]`, "metadata", "expected an object, not an array"},
		{`"metadata":{"a":1}`, "metadata.a", "expected a string"},
		{`"hone":[]`, "hone", "expected an object"},
		{`"hone":{"rank":8}`, "hone.rank", `did you mean r?`},
		{`"hone":{"loradropout":0}`, "hone.loradropout", `did you mean lora_dropout?`},
		{`"hone":{"max_seq_length":8}`, "hone.max_seq_length", `did you mean max_length?`},
		{`"hone":{"r":0}`, "hone.r", `1 to 256`},
		{`"hone":{"r":257}`, "hone.r", `1 to 256`},
		{`"hone":{"r":1.5}`, "hone.r", `expected an integer`},
		{`"hone":{"r":"8"}`, "hone.r", `expected an integer`},
		{`"hone":{"r":[8]}`, "hone.r", `expected an integer`},
		{`"hone":{"lora_alpha":0}`, "hone.lora_alpha", `more than 0`},
		{`"hone":{"lora_alpha":true}`, "hone.lora_alpha", `expected a number`},
		{`"hone":{"lora_dropout":1}`, "hone.lora_dropout", `less than 1`},
		{`"hone":{"use_rslora":1}`, "hone.use_rslora", `expected true or false`},
		{`"hone":{"target_modules":["lm_head"]}`, "hone.target_modules", `q_proj`},
		{`"hone":{"target_modules":[]}`, "hone.target_modules", `a list of strings`},
		{`"hone":{"target_modules":["q_proj","q_proj"]}`, "hone.target_modules", `twice`},
		{`"hone":{"target_modules":7}`, "hone.target_modules", `a list of strings`},
		{`"hone":{"layers_to_transform":[-1]}`, "hone.layers_to_transform", `from 0`},
		{`"hone":{"layers_to_transform":[1,1]}`, "hone.layers_to_transform", `twice`},
		{`"hone":{"layers_to_transform":[0.5]}`, "hone.layers_to_transform", `a list of integers`},
		{`"hone":{"layers_to_transform":3}`, "hone.layers_to_transform", `a list of integers`},
		{`"hone":{"init_lora_weights":"pissa"}`, "hone.init_lora_weights", `expected true or gaussian`},
		{`"hone":{"init_lora_weights":false}`, "hone.init_lora_weights", `expected a string`},
		{`"hone":{"learning_rate":"high"}`, "hone.learning_rate", `is "high", expected a number`},
		{`"hone":{"learning_rate":0}`, "hone.learning_rate", `more than 0 and at most 1`},
		{`"hone":{"learning_rate":1.1}`, "hone.learning_rate", `at most 1`},
		{`"hone":{"learning_rate":1e-3,"learning_rate_multiplier":2}`, "hone.learning_rate", `give one`},
		{`"hone":{"learning_rate_multiplier":0}`, "hone.learning_rate_multiplier", `more than 0`},
		{`"hone":{"num_train_epochs":0}`, "hone.num_train_epochs", `1 to 1000`},
		{`"hone":{"max_steps":0}`, "hone.max_steps", `expected 1 to`},
		{`"hone":{"max_steps":-2}`, "hone.max_steps", `expected 1 to`},
		{`"hone":{"batch_size":0}`, "hone.batch_size", `1 to 4096`},
		{`"hone":{"per_device_train_batch_size":0}`, "hone.per_device_train_batch_size", `1 to 4096`},
		{`"hone":{"gradient_accumulation_steps":-1}`, "hone.gradient_accumulation_steps", `1 to 4096`},
		{`"hone":{"per_device_train_batch_size":2,"gradient_accumulation_steps":4,"batch_size":4}`, "hone.batch_size", `is 8; give one`},
		{`"hone":{"per_device_train_batch_size":4096,"gradient_accumulation_steps":2}`, "hone.gradient_accumulation_steps", `is 8192; expected at most 4096`},
		{`"hone":{"warmup_ratio":1.1}`, "hone.warmup_ratio", `0 to 1`},
		{`"hone":{"warmup_steps":-1}`, "hone.warmup_steps", `0 to`},
		{`"hone":{"warmup_ratio":0.1,"warmup_steps":1}`, "hone.warmup_ratio", `give one`},
		{`"hone":{"lr_scheduler_type":"constant","warmup_steps":3}`, "hone.warmup_steps", `constant_with_warmup`},
		{`"hone":{"lr_scheduler_type":"constant","warmup_ratio":0.1}`, "hone.warmup_ratio", `constant_with_warmup`},
		{`"hone":{"lr_scheduler_type":"polynomial"}`, "hone.lr_scheduler_type", `cosine`},
		{`"hone":{"lr_scheduler_type":"cosine_with_min_lr"}`, "hone.lr_scheduler_kwargs", `needs lr_scheduler_kwargs`},
		{`"hone":{"lr_scheduler_kwargs":{"min_lr":0}}`, "hone.lr_scheduler_kwargs", `of lr_scheduler_type cosine_with_min_lr`},
		{`"hone":{"lr_scheduler_type":"cosine","lr_scheduler_kwargs":{"min_lr":0}}`, "hone.lr_scheduler_kwargs", `of lr_scheduler_type cosine_with_min_lr`},
		{`"hone":{"lr_scheduler_type":"cosine_with_min_lr","lr_scheduler_kwargs":{}}`, "hone.lr_scheduler_kwargs", `one of min_lr and min_lr_rate`},
		{`"hone":{"lr_scheduler_type":"cosine_with_min_lr","lr_scheduler_kwargs":{"min_lr":0,"min_lr_rate":0}}`, "hone.lr_scheduler_kwargs", `one of min_lr and min_lr_rate`},
		{`"hone":{"lr_scheduler_type":"cosine_with_min_lr","lr_scheduler_kwargs":{"min_lr":0.1},"learning_rate":0.01}`, "hone.lr_scheduler_kwargs", `0 to learning_rate`},
		{`"hone":{"lr_scheduler_type":"cosine_with_min_lr","lr_scheduler_kwargs":{"min_lr_rate":2}}`, "hone.lr_scheduler_kwargs", `0 to 1`},
		{`"hone":{"lr_scheduler_kwargs":{"num_cycles":2}}`, "hone.lr_scheduler_kwargs", `a share of learning_rate`},
		{`"hone":{"weight_decay":-1}`, "hone.weight_decay", `at least 0`},
		{`"hone":{"adam_beta1":1}`, "hone.adam_beta1", `less than 1`},
		{`"hone":{"adam_beta2":-0.1}`, "hone.adam_beta2", `at least 0`},
		{`"hone":{"adam_epsilon":0}`, "hone.adam_epsilon", `more than 0`},
		{`"hone":{"max_grad_norm":-1}`, "hone.max_grad_norm", `at least 0`},
		{`"hone":{"max_length":1}`, "hone.max_length", `expected 2 to`},
		{`"hone":{"long_rows":"split"}`, "hone.long_rows", `drop or truncate`},
		{`"hone":{"choices":["A"]}`, "hone.choices", `2 to 64`},
		{`"hone":{"choices":["A","A"]}`, "hone.choices", `twice`},
		{`"hone":{"choices":["A",""]}`, "hone.choices", `without white space`},
		{`"hone":{"choices":["A"," B"]}`, "hone.choices", `without white space`},
		{`"hone":{"choices":["A","B"],"train_on_all":true}`, "hone.choices", `give one`},
		{`"hone":{"choices":["0","1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17","18","19","20","21","22","23","24","25","26","27","28","29","30","31","32","33","34","35","36","37","38","39","40","41","42","43","44","45","46","47","48","49","50","51","52","53","54","55","56","57","58","59","60","61","62","63","64"]}`, "hone.choices", `has 65 answers`},
		{`"hone":{"beta":0.1}`, "hone.beta", `is of method dpo, and this job is supervised`},
		{`"hone":{"loss_type":"ipo"}`, "hone.loss_type", `is of method dpo`},
		{`"hone":{"label_smoothing":0}`, "hone.label_smoothing", `is of method dpo`},
		{`"hone":{"loss_type":"hinge"}`, "hone.loss_type", `sigmoid or ipo`},
		{`"hone":{"label_smoothing":0.5}`, "hone.label_smoothing", `less than 0.5`},
		{`"hone":{"eval_strategy":"daily"}`, "hone.eval_strategy", `no, steps or epoch`},
		{`"hone":{"eval_steps":2}`, "hone.eval_steps", `only of eval_strategy steps`},
		{`"hone":{"eval_strategy":"steps"}`, "hone.eval_strategy", `needs eval_steps`},
		{`"hone":{"eval_strategy":"epoch"}`, "hone.eval_strategy", `needs a validation_file`},
		{`"hone":{"save_steps":2}`, "hone.save_steps", `only of save_strategy steps`},
		{`"hone":{"save_strategy":"steps"}`, "hone.save_strategy", `needs save_steps`},
		{`"hone":{"save_strategy":"epoch","save_steps":2}`, "hone.save_steps", `only of`},
		{`"hone":{"save_total_limit":0}`, "hone.save_total_limit", `1 to`},
		{`"hone":{"save_minutes":0}`, "hone.save_minutes", `more than 0`},
		{`"hone":{"logging_steps":0}`, "hone.logging_steps", `1 to`},
		{`"hone":{"load_best_model_at_end":true}`, "hone.load_best_model_at_end", `needs a validation_file`},
		{`"hone":{"load_best_model_at_end":true,"eval_strategy":"no"}`, "hone.load_best_model_at_end", `eval_strategy is no`},
		{`"hone":{"batch_size":4,"gradient_accumulation_steps":4}`, "hone.gradient_accumulation_steps", `whole optimizer step`},
		{`"hone":{"load_best_model_at_end":true,"save_strategy":"no"}`, "hone.save_strategy", `needs the same`},
		{`"hone":{"load_best_model_at_end":true,"save_strategy":"steps","save_steps":3,"eval_strategy":"steps","eval_steps":2}`, "hone.save_steps", `a multiple of eval_steps, which is 2`},
		{`"hone":{"metric_for_best_model":"bleu"}`, "hone.metric_for_best_model", `loss, accuracy or choice_accuracy`},
		{`"hone":{"early_stopping_patience":0}`, "hone.early_stopping_patience", `1 to`},
		{`"hone":{"early_stopping_patience":2}`, "hone.early_stopping_patience", `needs a validation_file`},
		{`"hone":{"early_stopping_threshold":0.1}`, "hone.early_stopping_threshold", `without early_stopping_patience`},
		{`"hone":{"early_stopping_patience":2,"early_stopping_threshold":-1}`, "hone.early_stopping_threshold", `at least 0`},
		{`"hone":{"device":"tpu"}`, "hone.device", `auto, cpu or cuda`},
		{`"hone":{"memory":"tiny"}`, "hone.memory", `exact, middle or low`},
		{`"hone":{"micro_batch_tokens":1}`, "hone.micro_batch_tokens", `32 to 65536`},
		{`"method":{"type":"dpo"},"hone":{"train_on_all":true}`, "hone.train_on_all", `no meaning in a dpo job`},
		{`"method":{"type":"dpo"},"hone":{"choices":["A","B"]}`, "hone.choices", `leave it out of a dpo job`},
		{`"method":{"type":"dpo"},"hone":{"loss_type":"ipo","label_smoothing":0.1}`, "hone.label_smoothing", `ipo has no label_smoothing`},
		{`"method":{"type":"dpo"},"hone":{"beta":2.5}`, "hone.beta", `at most 2`},
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
// The listing is paged by its cursor and filtered by metadata.
func TestListJobs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := r.upload(t)
	var ids []string
	for _, metadata := range []map[string]string{{"team": "a", "run": "1"}, {"team": "a", "run": "2"}, nil, {"team": "b"}, {"a'\"] =": "ü"}} {
		job, err := r.jobs.Create(t.Context(), finetune.Spec{Model: "smol", TrainingFile: file, Metadata: metadata})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, job.ID)
	}
	for query, want := range map[string][]int{
		"":                                      {4, 3, 2, 1, 0},
		"limit=2":                               {4, 3},
		"limit=2&after=" + ids[3]:               {2, 1},
		"limit=2&after=" + ids[1]:               {0},
		"limit=2&after=" + ids[0]:               {},
		"metadata%5Bteam%5D=a":                  {1, 0},
		"metadata[team]=a&metadata[run]=2":      {1},
		"metadata[team]=a&metadata[run]=3":      {},
		"metadata[team]=A":                      {},
		"metadata[team]=a&after=" + ids[1]:      {0},
		"metadata=null":                         {2},
		"metadata%5Ba'%22%5D%20%3D%5D=%C3%BC":   nil, // a key with brackets cannot be asked for
		"metadata%5Bnone%5D=":                   {},
		"metadata[team]=a&limit=1":              {1},
		"limit=1000&after=" + ids[2] + "&foo=1": {1, 0},
	} {
		var list wire.List[wire.FineTuningJob]
		status, body := r.do(t, "GET", "/v1/fine_tuning/jobs?"+query, "")
		if want == nil {
			if status >= 500 {
				t.Errorf("%s: %d %s", query, status, body)
			}
			continue
		}
		if err := json.Unmarshal([]byte(body), &list); err != nil || status != 200 {
			t.Errorf("%s: %d %s", query, status, body)
			continue
		}
		got := []string{}
		for _, job := range list.Data {
			got = append(got, job.ID)
		}
		wantIDs := []string{}
		for _, i := range want {
			wantIDs = append(wantIDs, ids[i])
		}
		more := strings.Contains(query, "limit=2") && len(want) == 2 || query == "metadata[team]=a&limit=1"
		if diff := cmp.Diff(wantIDs, got); diff != "" || list.HasMore != more {
			t.Errorf("%s: has_more %v (-want +got)\n%s", query, list.HasMore, diff)
		}
		if len(want) > 0 && (*list.FirstID != got[0] || *list.LastID != got[len(got)-1]) {
			t.Errorf("%s: first_id %s, last_id %s", query, *list.FirstID, *list.LastID)
		}
	}
	for query, param := range map[string]string{
		"limit=0": "limit", "limit=1001": "limit", "limit=x": "limit", "after=ftjob-none": "after", "metadata=a": "metadata",
	} {
		status, body := r.do(t, "GET", "/v1/fine_tuning/jobs?"+query, "")
		wantError(t, query, status, body, 400, param, "", param)
	}
	// The cursor of a job's events is an event of that job.
	events, _, err := r.jobs.Events(t.Context(), ids[0], "", 1)
	if err != nil {
		t.Fatal(err)
	}
	status, body := r.do(t, "GET", "/v1/fine_tuning/jobs/"+ids[1]+"/events?after="+events[0].ID, "")
	wantError(t, "event of another job", status, body, 400, "after", "", events[0].ID)
}

func TestPauseJob(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	job, err := r.jobs.Create(t.Context(), finetune.Spec{Model: "smol", TrainingFile: r.upload(t)})
	if err != nil {
		t.Fatal(err)
	}
	path := "/v1/fine_tuning/jobs/" + job.ID
	if status, body := r.do(t, "GET", path, ""); status != 200 || strings.Contains(body, `"hone"`) {
		t.Errorf("a job that uses no extension: %d %s", status, body)
	}
	for _, step := range []struct{ do, want string }{
		{"pause", `"hone":{"paused":"requested"}`}, {"pause", `"paused":"requested"`}, {"resume", `"id":"` + job.ID}, {"resume", `"status":"validating_files"`},
	} {
		status, body := r.do(t, "POST", path+"/"+step.do, "")
		if status != 200 || !strings.Contains(body, step.want) || step.do == "resume" && strings.Contains(body, "paused") {
			t.Errorf("%s: %d %s", step.do, status, body)
		}
	}
	if _, err := r.jobs.Cancel(t.Context(), job.ID); err != nil {
		t.Fatal(err)
	}
	for _, do := range []string{"pause", "resume"} {
		status, body := r.do(t, "POST", path+"/"+do, "")
		wantError(t, do, status, body, 409, "", "conflict", "is cancelled and cannot be "+do)
		status, body = r.do(t, "POST", "/v1/fine_tuning/jobs/ftjob-none/"+do, "")
		wantError(t, do, status, body, 404, "", "not_found", "ftjob-none")
	}
}

func TestCheckpointPermissions(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	name := r.tunedAs(t, smolDigest, ":ckpt-step-2")
	for _, id := range []string{name, strings.ReplaceAll(name, ":", "%3A")} {
		path := "/v1/fine_tuning/checkpoints/" + id + "/permissions"
		status, body := r.do(t, "GET", path+"?limit=1&order=ascending", "")
		var list wire.List[wire.CheckpointPermission]
		if err := json.Unmarshal([]byte(body), &list); err != nil || status != 200 || len(list.Data) != 1 || list.Data[0].Object != "checkpoint.permission" ||
			list.Data[0].ProjectID != "proj_local" || list.HasMore || *list.LastID != list.Data[0].ID {
			t.Fatalf("%d %s, %v", status, body, err)
		}
		only := list.Data[0].ID
		for _, query := range []string{"?project_id=proj_x", "?after=" + only} {
			if status, body := r.do(t, "GET", path+query, ""); status != 200 || !strings.Contains(body, `"data":[]`) {
				t.Errorf("%s: %d %s", query, status, body)
			}
		}
		if status, body := r.do(t, "POST", path, `{"project_ids":["proj_local"]}`); status != 200 || !strings.Contains(body, only) {
			t.Errorf("create: %d %s", status, body)
		}
		status, body = r.do(t, "POST", path, `{"project_ids":["proj_local","proj_x"]}`)
		wantError(t, "another project", status, body, 400, "project_ids[1]", "", "proj_x")
		status, body = r.do(t, "POST", path, `{}`)
		wantError(t, "no project", status, body, 400, "project_ids", "", "proj_local")
		status, body = r.do(t, "DELETE", path+"/"+only, "")
		wantError(t, "delete", status, body, 409, "permission", "conflict", "stays")
		status, body = r.do(t, "DELETE", path+"/cp_none", "")
		wantError(t, "delete another", status, body, 404, "permission", "not_found", "cp_none")
		status, body = r.do(t, "GET", path+"?order=desc", "")
		wantError(t, "order", status, body, 400, "order", "", "descending")
	}
	for _, none := range []string{"ft:smol:local::none:ckpt-step-1", r.tuned(t, smolDigest), "smol"} {
		status, body := r.do(t, "GET", "/v1/fine_tuning/checkpoints/"+none+"/permissions", "")
		wantError(t, none, status, body, 404, "checkpoint", "not_found", none)
	}
}

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
			R: new(8), LoraAlpha: new(16.0), LoraDropout: new(0.05), TargetModules: []string{"q_proj", "v_proj"}, PerDeviceBatchSize: new(2), GradientAccumulation: new(4), NumTrainEpochs: new(3),
			LearningRate: new(2e-4), LRSchedulerType: new("cosine"), WarmupRatio: new(0.03), MaxLength: new(256), UseRSLoRA: new(false),
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// planner is a trainer that only plans: what a dry run needs.
type planner struct {
	finetune.Trainer
	events chan child.TrainerEvent
}

func startPlanner(_ context.Context, config child.TrainerConfig) (finetune.Trainer, error) {
	p := &planner{events: make(chan child.TrainerEvent, 4)}
	defer close(p.events)
	if config.Options.R != nil && *config.Options.R == 256 {
		p.events <- child.TrainerEvent{Type: child.EventFailed, Error: &child.Error{Code: child.CodeInsufficientMemory, Message: "it takes 9 GiB of 8; r 64 would fit", Param: "hone.r"}}
		return p, nil
	}
	p.events <- child.TrainerEvent{Type: child.EventDataset, TrainRows: 9, TrainTokens: 90, SharedTokens: 30, DroppedRows: 1}
	p.events <- child.TrainerEvent{Type: child.EventMemory, Memory: &child.MemoryPlan{Device: "cpu", Layout: "exact", TotalBytes: 7}}
	p.events <- child.TrainerEvent{Type: child.EventPlan, Plan: &child.TrainPlan{Method: config.Method, R: 16, TotalSteps: 12}}
	p.events <- child.TrainerEvent{Type: child.EventDone}
	return p, nil
}

func (p *planner) Events() <-chan child.TrainerEvent { return p.events }
func (p *planner) Kill()                             {}
func (p *planner) Wait() error                       { return nil }

func TestDryRun(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	request := `{"model":"smol","training_file":"` + r.upload(t) + `","hone":{"r":`
	status, body := r.do(t, "POST", "/v1/fine_tuning/jobs/dry_run", request+`8}}`)
	for _, want := range []string{
		`"object":"fine_tuning.job.dry_run","model":"smol","method":{"type":"supervised"}`, `"validation_file":null,"train_rows":9,`, `"shared_tokens":30`,
		`"dropped_rows":1`, `"options":{"r":8}`, `"total_steps":12`, `"layout":"exact"`, `"total_bytes":7`, `"notes":[]`,
	} {
		if status != 200 || !strings.Contains(body, want) {
			t.Errorf("%d %s\nlacks %s", status, body, want)
		}
	}
	status, body = r.do(t, "POST", "/v1/fine_tuning/jobs/dry_run", request+`256}}`)
	wantError(t, "too large", status, body, 400, "hone.r", "insufficient_memory", "r 64 would fit")
	status, body = r.do(t, "POST", "/v1/fine_tuning/jobs/dry_run", request+`0}}`)
	wantError(t, "out of range", status, body, 400, "hone.r", "", "1 to 256")
	if status, body = r.do(t, "GET", "/v1/fine_tuning/jobs", ""); status != 200 || !strings.Contains(body, `"data":[]`) {
		t.Errorf("a dry run made a job: %d %s", status, body)
	}
}

func TestDPOJob(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	// go-openai has no method to send, so the request is written out; it reads the answer all the same.
	status, body := r.do(t, "POST", "/v1/fine_tuning/jobs", `{"model":"smol","training_file":"`+r.upload(t)+`",
		"method":{"type":"dpo","dpo":{"hyperparameters":{"beta":0.2,"n_epochs":"auto"}}},"hone":{"loss_type":"ipo"}}`)
	want := `"method":{"type":"dpo","dpo":{"hyperparameters":{"batch_size":"auto","learning_rate_multiplier":"auto","n_epochs":"auto","beta":0.2}}}`
	if status != 200 || !strings.Contains(body, want) || !strings.Contains(body, `"hone":{"options":{"beta":0.2,"loss_type":"ipo"}}`) {
		t.Errorf("%d %s\nlacks %s", status, body, want)
	}
	jobs, _, err := r.jobs.List(t.Context(), finetune.Query{Limit: 1})
	if err != nil || len(jobs) != 1 || jobs[0].MethodType != "dpo" {
		t.Fatalf("jobs %+v, %v", jobs, err)
	}
	if got, err := r.client().RetrieveFineTuningJob(t.Context(), jobs[0].ID); err != nil || got.Hyperparameters.Epochs != "auto" {
		t.Errorf("go-openai reads %+v, %v", got, err)
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
	if got, err = jobToWire(failed); err != nil || got.Error.Code != "invalid_training_file" || *got.Error.Param != "training_file" || *got.FinishedAt != 9 || got.Hone != nil {
		t.Errorf("failed job %+v, %v", got, err)
	}
}
