package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/pflag"

	"github.com/hone-llm/hone/client"
)

// exampleEnv names the directory of the example questions to the small server below.
const exampleEnv = "HONE_TEST_EXAMPLES"

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"hone": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			// `hone demo` starts this binary's `serve`: here the small server, so that the story is told in a second.
			if examples := os.Getenv(exampleEnv); examples != "" && len(os.Args) > 1 && os.Args[1] == "serve" {
				server := httptest.NewServer(newSmallServer(examples))
				fmt.Fprintln(os.Stderr, os.Getpid())
				fmt.Println("listening on " + server.URL)
				<-ctx.Done()
				return
			}
			os.Exit(Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
		},
	})
}

func TestScripts(t *testing.T) {
	examples, err := filepath.Abs(filepath.Join("..", "..", "examples", "mcq"))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			server := httptest.NewServer(newSmallServer(examples))
			env.Defer(server.Close)
			env.Setenv("HONE_BASE_URL", server.URL+"/v1")
			env.Setenv("EXAMPLES", examples)
			env.Setenv(exampleEnv, examples)
			return nil
		},
	})
}

// smallServer is the API over a model that always says A, and over one that a job of three looks makes and that knows
// the example answers.
type smallServer struct {
	right map[string]string // by wording

	mu      sync.Mutex
	looks   int
	request client.FineTuningJobRequest
	cancel  bool
}

func newSmallServer(examples string) http.Handler {
	s := &smallServer{right: map[string]string{}}
	questions, err := client.ReadQuestions(filepath.Join(examples, "test.csv"), client.ReadOptions{})
	if err != nil {
		panic(err)
	}
	answers, err := client.ReadAnswers(filepath.Join(examples, "test_answers.csv"), "")
	if err != nil {
		panic(err)
	}
	for _, q := range questions {
		s.right[client.Word(client.DefaultTemplate, q)] = answers[q.ID]
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/models/{id}", s.model)
	mux.HandleFunc("POST /v1/chat/completions", s.chat)
	mux.HandleFunc("POST /v1/files", func(w http.ResponseWriter, r *http.Request) {
		_, header, err := r.FormFile("file")
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(w, `{"id":"file-%s","object":"file","purpose":"fine-tune","filename":%q}`, strings.TrimSuffix(header.Filename, ".jsonl"), header.Filename)
	})
	mux.HandleFunc("DELETE /v1/files/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"id":%q,"object":"file","deleted":true}`, r.PathValue("id"))
	})
	mux.HandleFunc("POST /v1/fine_tuning/jobs", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if err := json.NewDecoder(r.Body).Decode(&s.request); err != nil {
			panic(err)
		}
		if s.request.Suffix != nil && *s.request.Suffix == "refused" {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"error":{"message":"hone.r is 0","type":"invalid_request_error","param":"hone.r","code":null}}`)
			return
		}
		fmt.Fprint(w, `{"id":"ftjob-1","status":"validating_files"}`)
	})
	mux.HandleFunc("GET /v1/fine_tuning/jobs/ftjob-1", s.job)
	mux.HandleFunc("GET /v1/fine_tuning/jobs/ftjob-long", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"id":"ftjob-long","status":"running"}`)
	})
	mux.HandleFunc("GET /v1/fine_tuning/jobs/ftjob-long/events", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"object":"list","data":[{"id":"e1","level":"info","message":"Fine-tuning job started","type":"message","data":{}}],"has_more":false}`)
	})
	mux.HandleFunc("GET /v1/fine_tuning/jobs", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"object":"list","data":[{"id":"ftjob-1","status":"failed","model":"base","created_at":1,"error":{"code":"c","message":"行 3 is not JSON"}}],"has_more":false}`)
	})
	mux.HandleFunc("POST /v1/fine_tuning/jobs/ftjob-1/pause", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"id":"ftjob-1","status":"queued","hone":{"paused":"requested"}}`)
	})
	mux.HandleFunc("POST /v1/fine_tuning/jobs/ftjob-1/resume", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"id":"ftjob-1","status":"queued"}`)
	})
	mux.HandleFunc("POST /v1/fine_tuning/jobs/ftjob-1/cancel", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		s.cancel = true
		s.mu.Unlock()
		fmt.Fprint(w, `{"id":"ftjob-1","status":"cancelled"}`)
	})
	mux.HandleFunc("GET /v1/fine_tuning/jobs/ftjob-1/events", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"object":"list","data":[{"id":"e2","level":"info","message":"Step 1/3: training loss=0.70","type":"metrics","data":{"step":1}},
			{"id":"e1","level":"info","message":"Fine-tuning job started","type":"message","data":{}}],"has_more":false}`)
	})
	mux.HandleFunc("POST /v1/fine_tuning/jobs/dry_run", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"object":"fine_tuning.job.dry_run","model":"base","start_adapter":"ft:base:local:a:b","method":{"type":"supervised"},"train_rows":1517,"valid_rows":20,
			"train_tokens":90000,"valid_tokens":800,"shared_tokens":9000,"truncated_rows":2,"dropped_rows":3,"options":{"r":8,"warmup_ratio":0.03},"notes":["the long way round"],
			"plan":{"r":8,"lora_alpha":16,"target_modules":["q_proj","v_proj"],"num_train_epochs":3,"batch_size":4,"total_steps":1138,
			"memory":{"device":"cpu","layout":"exact","forward":"f32","backward":"bf16","total_bytes":1073741824,"free_bytes":2147483648,"micro_batch_tokens":1024}}}`)
	})
	mux.HandleFunc("GET /v1/fine_tuning/jobs/ftjob-1/checkpoints", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"object":"list","data":[{"id":"ftckpt_1","fine_tuned_model_checkpoint":"ft:base:local:quiz:1:ckpt-step-2","step_number":2,"created_at":1,
			"metrics":{"step":2,"train_loss":0.5,"valid_choice_accuracy":0.75}}],"has_more":false}`)
	})
	mux.HandleFunc("GET /request", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(s.request) })
	return mux
}

const smallTuned = "ft:base:local:quiz:1"

func (s *smallServer) model(w http.ResponseWriter, r *http.Request) {
	switch id := r.PathValue("id"); id {
	case "SmolLM2-135M-Instruct", "slow", "base":
		fmt.Fprintf(w, `{"id":%q,"object":"model"}`, id)
	case smallTuned:
		template, _ := json.Marshal(client.DefaultTemplate)
		fmt.Fprintf(w, `{"id":%q,"object":"model","hone":{"kind":"tuned","question_template":%s}}`, id, template)
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"error":{"message":"the model %s does not exist","type":"invalid_request_error","param":"model","code":"model_not_found"}}`, id)
	}
}

func (s *smallServer) chat(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Model    string
		Stream   bool
		Messages []struct{ Content string }
	}
	body, _ := io.ReadAll(r.Body)
	if err := json.Unmarshal(body, &request); err != nil {
		panic(err)
	}
	content := request.Messages[len(request.Messages)-1].Content
	if request.Stream {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, piece := range []string{"You said: ", content} {
			text, _ := json.Marshal(piece)
			fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":%s},\"finish_reason\":null}]}\n\n", text)
		}
		if content != "break" {
			fmt.Fprint(w, "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
		}
		return
	}
	if strings.Contains(content, "too long") {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"error":{"message":"the prompt has 9000 tokens, the context 8192","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}`)
		return
	}
	letter := "A"
	if right := s.right[content]; right != "" && request.Model == smallTuned {
		letter = right
	}
	if request.Model == "slow" || os.Getenv("HONE_TEST_SLOW") != "" {
		time.Sleep(200 * time.Millisecond)
	}
	fmt.Fprintf(w, `{"choices":[{"index":0,"message":{"role":"assistant","content":%q},"logprobs":{"content":[{"token":%q,"logprob":%g,"top_logprobs":[]}]},"finish_reason":"stop"}]}`,
		letter, letter, math.Log(0.9))
}

func (s *smallServer) job(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.looks++
	switch {
	case s.cancel:
		fmt.Fprint(w, `{"id":"ftjob-1","status":"cancelled"}`)
	case s.looks <= 2:
		fmt.Fprintf(w, `{"id":"ftjob-1","status":"running","hone":{"progress":{"step":%d,"total_steps":3,"step_fraction":0.5,"tokens_per_second":310,"seconds_left":9,"train_loss":0.7,"full_valid_loss":0.6,"full_valid_mean_token_accuracy":0.75}}}`, s.looks)
	default:
		fmt.Fprintf(w, `{"id":"ftjob-1","status":"succeeded","fine_tuned_model":%q,"trained_tokens":1000}`, smallTuned)
	}
}

// TestJobRequest checks what `hone finetune create` asks for.
func TestJobRequest(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(newSmallServer(filepath.Join("..", "..", "examples", "mcq")))
	defer server.Close()
	dir := t.TempDir()
	if _, err := makeDataset(datasetOptions{in: filepath.Join("..", "..", "examples", "mcq", "zh.csv"), out: dir, valid: 0.25, seed: 3}); err != nil {
		t.Fatal(err)
	}
	s := streams{in: strings.NewReader(""), out: io.Discard, err: io.Discard}
	request, err := jobRequest(t.Context(), s, client.New(server.URL+"/v1", ""), jobOptions{model: "base", training: filepath.Join(dir, "train.jsonl"), validation: "file-9",
		suffix: "quiz", method: "supervised", hone: optionFlags(t, "--r=8", "--target-modules", "q_proj,v_proj", "--lr-scheduler-type=cosine_with_min_lr", "--use-rslora", "--learning_rate=2e-4",
			"--n-epochs=2", "--batch-size=auto", "--layers-to-transform=1,2", "--lr-scheduler-kwargs=min_lr_rate=0.1", "--choices", `["a,b","c"]`)})
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	template, _ := json.Marshal(client.DefaultTemplate)
	want := `{"model":"base","training_file":"file-train","validation_file":"file-9","suffix":"quiz","method":{"type":"supervised"},` +
		`"hone":{"batch_size":"auto","choices":["a,b","c"],"layers_to_transform":[1,2],"learning_rate":2e-4,"lr_scheduler_kwargs":{"min_lr_rate":0.1},` +
		`"lr_scheduler_type":"cosine_with_min_lr","num_train_epochs":2,"question_template":` + string(template) + `,"r":8,"target_modules":["q_proj","v_proj"],"use_rslora":true}}`
	if string(got) != want {
		t.Errorf("request\n%s\nwant\n%s", got, want)
	}
	// A training file that was changed by hand is no longer known to be worded so.
	path := filepath.Join(dir, "train.jsonl")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(data, data...), 0o600); err != nil {
		t.Fatal(err)
	}
	if request, err = jobRequest(t.Context(), s, client.New(server.URL+"/v1", ""), jobOptions{model: "base", training: path}); err != nil || request.Hone != nil {
		t.Errorf("changed file: hone %s, %v", request.Hone, err)
	}
	if _, err := jobRequest(t.Context(), s, nil, jobOptions{hone: optionFlags(t, "--eval-steps=2")}); !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), "--eval-steps: eval_steps is only of") {
		t.Errorf("contradiction: %v", err)
	}
}

// optionFlags parses flags of options.
func optionFlags(t *testing.T, args ...string) map[string]json.RawMessage {
	t.Helper()
	options := map[string]json.RawMessage{}
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	addOptionFlags(f, options)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	return options
}

func TestOptionFlags(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"--r=many", "--r=1.5", "--r", "--learning-rate=x", "--use-rslora=maybe", "--layers-to-transform=a", "--lr-scheduler-kwargs=min_lr", "--lr-scheduler-kwargs=x=1", "--rank=8"} {
		f := pflag.NewFlagSet("", pflag.ContinueOnError)
		addOptionFlags(f, map[string]json.RawMessage{})
		if err := f.Parse([]string{bad}); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

func TestDiscordant(t *testing.T) {
	t.Parallel()
	run := func(letters string) *predictResult {
		r := &predictResult{gold: map[string]string{}}
		for i, l := range letters {
			id := fmt.Sprint(i)
			r.gold[id] = "A"
			r.predictions = append(r.predictions, client.Prediction{Question: client.Question{ID: id}, Answer: strings.TrimSpace(string(l))})
		}
		return r
	}
	first, second := discordant(run("AAAB B"), run("AABAA "))
	if !slices.Equal([]int{first, second}, []int{1, 2}) {
		t.Errorf("only first %d, only second %d, want 1 and 2", first, second)
	}
}
