package server

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
)

// scrape returns the samples of /metrics by name with labels.
func scrape(t *testing.T, r *rig) map[string]string {
	t.Helper()
	status, body := r.do(t, "GET", "/metrics", "")
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	samples := map[string]string{}
	for line := range strings.Lines(body) {
		if i := strings.LastIndexByte(line, ' '); !strings.HasPrefix(line, "#") && i > 0 {
			samples[line[:i]] = strings.TrimSpace(line[i+1:])
		}
	}
	return samples
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	loss, valid := 0.5, 0.25
	r := newRig(t, func(o *Options) {
		o.RunnerStatus = func(context.Context) []child.RunnerStatus {
			return []child.RunnerStatus{{Model: "smol", Running: 3, Waiting: 2, PoolTokens: 100, FreeTokens: 40}}
		}
		o.JobStats = func(context.Context) (finetune.Stats, error) {
			return finetune.Stats{Jobs: map[finetune.Status]int{finetune.Running: 1, finetune.Failed: 4}, Steps: 70, TrainedTokens: 900, Processes: map[string]int{"ftjob-1": os.Getpid()}, Running: []finetune.Job{{
				ID: "ftjob-1", Progress: finetune.Progress{Step: 10, Fraction: 0.5, TotalSteps: 20, TokensPerSecond: 300, SecondsLeft: 19, TrainLoss: &loss, ValidLoss: &valid},
			}}}, nil
		}
	})
	chat := func(path, fields, prompt string) {
		r.do(t, "POST", path, fmt.Sprintf(`{"model":"smol",%s"messages":[{"role":"user","content":%q}]}`, fields, prompt))
	}
	chat("/v1/chat/completions", "", "a b c")
	chat("/v1/chat/completions", `"stream":true,"n":2,`, "a b c")
	chat("/v1/chat/completions", "", "die")
	chat("/v1/unknown", "", "")
	r.do(t, "POST", "/v1/embeddings", `{"model":"smol","input":"a"}`)
	r.do(t, "GET", "/v1/files/none", "")
	r.do(t, "GET", "/v1/files/other", "")
	r.do(t, "BREW", "/v1/files/other", "")
	got := scrape(t, r)
	for sample, want := range map[string]string{
		`hone_http_requests_total{code="200",method="POST",route="/v1/chat/completions"}`:      "2",
		`hone_http_requests_total{code="500",method="POST",route="/v1/chat/completions"}`:      "1",
		`hone_http_requests_total{code="404",method="GET",route="/v1/files/:id"}`:              "2",
		`hone_http_requests_total{code="404",method="POST",route="none"}`:                      "1",
		`hone_http_requests_total{code="405",method="other",route="none"}`:                     "1",
		`hone_http_request_duration_seconds_count{method="POST",route="/v1/chat/completions"}`: "3",
		`hone_http_request_duration_seconds_count{method="GET",route="/v1/files/:id"}`:         "2",
		`hone_http_requests_in_flight`:                           "1",
		`hone_time_to_first_token_seconds_count{model="smol"}`:   "2",
		`hone_time_per_output_token_seconds_count{model="smol"}`: "2",
		`hone_prompt_tokens_total{model="smol"}`:                 "19", // 7 + 7 + 5
		`hone_cached_prompt_tokens_total{model="smol"}`:          "6",
		`hone_generation_tokens_total{model="smol"}`:             "9",
		`hone_runner_ready{model="smol"}`:                        "1",
		`hone_running{model="smol"}`:                             "3",
		`hone_queue_depth{model="smol"}`:                         "2",
		`hone_cache_free_tokens{model="smol"}`:                   "40",
		`hone_jobs{status="running"}`:                            "1",
		`hone_jobs{status="failed"}`:                             "4",
		`hone_job_steps_total`:                                   "70",
		`hone_job_step{job_id="ftjob-1"}`:                        "10.5",
		`hone_job_steps_per_second{job_id="ftjob-1"}`:            "0.5",
		`hone_job_train_loss{job_id="ftjob-1"}`:                  "0.5",
		`hone_job_validation_loss{job_id="ftjob-1"}`:             "0.25",
	} {
		if got[sample] != want {
			t.Errorf("%s is %q, want %s", sample, got[sample], want)
		}
	}
	if held, err := strconv.ParseFloat(got[`hone_job_resident_memory_bytes{job_id="ftjob-1"}`], 64); err != nil || held < 1<<20 {
		t.Errorf("the job's process holds %v, %v", held, err)
	}
	if _, ok := got["process_resident_memory_bytes"]; !ok {
		t.Error("no memory of the process")
	}
}

// TestMetricsAreBounded asks for what a scanner asks for, and has many models: neither makes more than so many series.
func TestMetricsAreBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	before := len(scrape(t, r))
	for i := range 3 * maxModelLabels {
		r.do(t, "GET", fmt.Sprintf("/wp-admin/%d", i), "")
		r.do(t, "GET", fmt.Sprintf("/v1/models/scan%d", i), "")
		r.do(t, "POST", "/v1/chat/completions", fmt.Sprintf(`{"model":"none%d","messages":[{"role":"user","content":"a"}]}`, i))
		r.server.metrics.usage(r.server.metrics.model(fmt.Sprintf("m%d", i)), &child.Usage{PromptTokens: 1})
	}
	got := scrape(t, r)
	models := 0
	for sample := range got {
		if strings.HasPrefix(sample, "hone_prompt_tokens_total{") {
			models++
		}
	}
	// maxModelLabels and "other", of which the rig's own model has a label without a prompt.
	if models > maxModelLabels+1 || len(got)-before > 3*(maxModelLabels+1)+100 {
		t.Errorf("%d models, %d series after %d", models, len(got), before)
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, model string
		change      func(*Options)
		status      int
		message     string
	}{
		{"the default model is loaded", "smol", func(*Options) {}, 200, ""},
		{"it was removed, and there is another", "gone", func(*Options) {}, 200, ""},
		{"no default", "", func(*Options) {}, 200, ""},
		{"no model at all", "smol", func(o *Options) { o.Models = bases{} }, 503, "hone pull"},
		{"it does not start", "smol", func(o *Options) { o.Generator = broken{o.Generator} }, 503, "smol does not start: bad file"},
		{"asked without a key", "smol", func(o *Options) { o.Generator = broken{o.Generator}; withKeys(o) }, 503, "no model can answer now"},
	} {
		r := newRig(t, func(o *Options) { o.DefaultModel = test.model; test.change(o) })
		status, body := r.do(t, "GET", "/ready", "")
		if test.status == 200 {
			if status != 200 || body != `{"status":"ready"}`+"\n" {
				t.Errorf("%s: %d %s", test.name, status, body)
			}
			continue
		}
		wantError(t, test.name, status, body, test.status, "", "not_ready", test.message)
	}
}

// broken is a Generator whose model does not start.
type broken struct{ Generator }

func (broken) Models() []child.ModelState {
	return []child.ModelState{{Model: "smol", State: child.Failed, Error: "bad file"}}
}

func TestHealthTellsStrangersNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t, withKeys)
	if status, body := r.do(t, "GET", "/health", ""); status != 200 || body != `{"status":"ok"}`+"\n" {
		t.Errorf("without a key: %d %s", status, body)
	}
	if status, body := r.do(t, "GET", "/health", "", "Authorization", "Bearer "+secrets["watcher"]); status != 200 || !strings.Contains(body, `"smol"`) {
		t.Errorf("with a key: %d %s", status, body)
	}
}

func TestProfiles(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for path, part := range map[string]string{"/": "goroutine", "/goroutine?debug=1": "TestProfiles", "/cmdline": "server", "/symbol": "num_symbols"} {
		if status, body := r.do(t, "GET", "/debug/pprof"+path, ""); status != 200 || !strings.Contains(body, part) {
			t.Errorf("%s: %d %.200s", path, status, body)
		}
	}
	status, body := r.do(t, "GET", "/debug/pprof/none", "")
	wantError(t, "no such profile", status, body, http.StatusNotFound, "", "not_found", "none")
}
