package app

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	openai "github.com/sashabaranov/go-openai"
	"go.uber.org/goleak"

	"github.com/hone-llm/hone/client"
	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/store"
)

// smallRoles in the environment makes this test binary play the children with small models: a runner that repeats the
// prompt, and a trainer that learns nothing.
const smallRoles = "HONE_TEST_SMALL_ROLES=1"

// RealRoles plays hone with the real engine; it is set where the engine is linked, and ok is false for a test's own flags.
var RealRoles func(args []string) (code int, ok bool)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Getenv("HONE_TEST_SMALL_ROLES") != "" {
		switch os.Args[1] {
		case "runner":
			os.Exit(smallRunner(bufio.NewReader(os.Stdin)))
		case "trainer":
			os.Exit(smallTrainer(bufio.NewReader(os.Stdin)))
		}
	}
	if RealRoles != nil && len(os.Args) > 1 {
		if code, ok := RealRoles(os.Args[1:]); ok {
			os.Exit(code)
		}
	}
	code := m.Run()
	http.DefaultClient.CloseIdleConnections() // of the tests' clients
	if err := goleak.Find(goleak.IgnoreTopFunction("github.com/hone-llm/hone/internal/child.forkThread")); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// smallRunner repeats the last message word by word. The word die ends the process, slow takes a minute.
func smallRunner(in *bufio.Reader) int {
	line, _ := in.ReadBytes('\n')
	var config child.RunnerConfig
	if err := json.Unmarshal(line, &config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", config.Socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		os.Exit(0)
	}()
	_ = json.NewEncoder(os.Stdout).Encode(child.RunnerEvent{Type: "ready", ContextTokens: 64})
	_ = http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/adapters/unload" {
			return
		}
		if r.URL.Path == "/status" {
			_ = json.NewEncoder(w).Encode(child.RunnerStatus{PoolTokens: 64, FreeTokens: 60})
			return
		}
		var req child.GenerateRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		events := json.NewEncoder(w)
		words := strings.Fields(req.Messages[len(req.Messages)-1].Content)
		if req.Adapter != nil {
			words = append(words, "(tuned)")
		}
		for _, word := range words {
			switch word {
			case "die":
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			case "slow":
				select {
				case <-r.Context().Done():
					return
				case <-time.After(time.Minute):
				}
			}
			_ = events.Encode(child.GenerateEvent{Text: word + " "})
			w.(http.Flusher).Flush()
		}
		_ = events.Encode(child.GenerateEvent{FinishReason: "stop", Usage: &child.Usage{PromptTokens: 1, CompletionTokens: len(words)}})
	}))
	return 1
}

// smallTrainer reports what a trainer does and writes an adapter. With max_steps 1000000 it goes on until it is killed.
func smallTrainer(in *bufio.Reader) int {
	line, _ := in.ReadBytes('\n')
	var config child.TrainerConfig
	if err := json.Unmarshal(line, &config); err != nil {
		return 1
	}
	fmt.Fprintln(os.Stderr, "small trainer")
	out := json.NewEncoder(os.Stdout)
	_ = out.Encode(child.TrainerEvent{Type: child.EventDataset, TrainRows: 1, TrainTokens: 8})
	_ = out.Encode(child.TrainerEvent{Type: child.EventPlan, Plan: &child.TrainPlan{R: 16, LoraAlpha: 32, NumTrainEpochs: 1, BatchSize: 1, TotalSteps: 1, LearningRateMultiplier: 1}})
	if config.DryRun {
		_ = out.Encode(child.TrainerEvent{Type: child.EventDone})
		return 0
	}
	if config.Options.MaxSteps != nil && *config.Options.MaxSteps == 1_000_000 {
		for {
			_ = out.Encode(child.TrainerEvent{Type: child.EventProgress, TotalSteps: 1_000_000, Fraction: 0.5, TokensPerSecond: 100, SecondsLeft: 1000})
			time.Sleep(10 * time.Millisecond)
		}
	}
	_ = out.Encode(child.TrainerEvent{Type: child.EventStep, Step: 1, TotalSteps: 1, TrainLoss: 0.5, TrainedTokens: 8})
	dir, id, name := config.Checkpoint(1)
	err := errors.Join(writeAdapter(config, dir, id, name), writeAdapter(config, config.AdapterDir, config.AdapterID, config.AdapterName))
	if err != nil {
		_ = out.Encode(child.TrainerEvent{Type: child.EventFailed, Error: &child.Error{Code: child.CodeInternal, Message: err.Error()}})
		return 1
	}
	_ = out.Encode(child.TrainerEvent{Type: child.EventCheckpoint, Step: 1, CheckpointDir: dir})
	_ = out.Encode(child.TrainerEvent{Type: child.EventDone})
	return 0
}

func writeAdapter(config child.TrainerConfig, dir, id, name string) error {
	weights := []byte("weights")
	sum := sha256.Sum256(weights)
	manifest, err := json.Marshal(lora.Manifest{
		ID: id, Name: name, BaseModel: config.BaseModel, BaseDigest: config.BaseDigest, JobID: config.JobID,
		CreatedAt: 1, Rank: 16, Alpha: 32, TargetModules: []string{"q_proj"}, MaxLength: 8,
		Files: map[string]string{lora.GGUFFile: hex.EncodeToString(sum[:])},
	})
	return errors.Join(err, os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, lora.GGUFFile), weights, 0o600),
		os.WriteFile(filepath.Join(dir, lora.ManifestFile), manifest, 0o600))
}

func config(t *testing.T) configs.Config {
	t.Helper()
	cfg, err := configs.Default()
	if err != nil {
		t.Fatal(err)
	}
	cfg.DataDir, cfg.Port, cfg.DefaultModel = t.TempDir(), 0, ""
	return cfg
}

// addModel adds a model that is only a name.
func addModel(t *testing.T, dataDir string) {
	t.Helper()
	dir := filepath.Join(dataDir, "models", "small")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(models.Manifest{Name: "small", Digest: strings.Repeat("ab", 32), Bytes: 4, Architecture: "llama", ContextTokens: 64})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{models.WeightsFile: []byte("GGUF"), models.ManifestFile: manifest} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// start starts a server with the small roles over a model that is only a name.
func start(t *testing.T, cfg configs.Config) (*App, *openai.Client) {
	t.Helper()
	addModel(t, cfg.DataDir)
	a := New(cfg, Options{Env: []string{smallRoles}})
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Stop(context.Background()) }) // tests of stopping look at its error
	client := openai.DefaultConfig("key")
	client.BaseURL = a.URL() + "/v1"
	return a, openai.NewClientWithConfig(client)
}

func chat(t *testing.T, client *openai.Client, model, prompt string) (string, error) {
	t.Helper()
	resp, err := client.CreateChatCompletion(t.Context(), openai.ChatCompletionRequest{
		Model: model, Messages: []openai.ChatCompletionMessage{{Role: "user", Content: prompt}},
	})
	if err != nil {
		return "", err
	}
	return resp.Choices[0].Message.Content, nil
}

// children returns the process ids of this process's children.
func children(t *testing.T) []int {
	t.Helper()
	var pids []int
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		data, _ := os.ReadFile(list) // a thread may end meanwhile
		for field := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestStory is what a user does: chat, upload, tune, chat with the tuned model, delete it, stop.
func TestStory(t *testing.T) {
	a, client := start(t, config(t))
	if text, err := chat(t, client, "small", "hello there"); err != nil || text != "hello there " {
		t.Fatalf("chat: %q, %v", text, err)
	}
	apiError := new(openai.APIError)
	if _, err := chat(t, client, "small", "die"); !errors.As(err, &apiError) || apiError.Code != "runner_ended" {
		t.Errorf("a runner that died: %v", err)
	}
	if text, err := chat(t, client, "small", "again"); err != nil || text != "again " {
		t.Errorf("after the runner died: %q, %v", text, err)
	}

	file, err := client.CreateFileBytes(t.Context(), openai.FileBytesRequest{
		Name: "train.jsonl", Purpose: openai.PurposeFineTune,
		Bytes: []byte(`{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}` + "\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	job, err := client.CreateFineTuningJob(t.Context(), openai.FineTuningJobRequest{Model: "small", TrainingFile: file.ID, Suffix: "quiz"})
	if err != nil {
		t.Fatal(err)
	}
	job = waitForJob(t, client, job.ID, func(job openai.FineTuningJob) bool { return job.FinishedAt != 0 })
	if job.Status != "succeeded" || !strings.HasPrefix(job.FineTunedModel, "ft:small:local:quiz:") || job.TrainedTokens != 8 || len(job.ResultFiles) != 2 {
		events, _ := client.ListFineTuningJobEvents(t.Context(), job.ID)
		t.Fatalf("job %+v\n%+v", job, events)
	}
	if text, err := chat(t, client, job.FineTunedModel, "hello"); err != nil || text != "hello (tuned) " {
		t.Errorf("the tuned model: %q, %v", text, err)
	}
	if text, err := chat(t, client, job.FineTunedModel+":ckpt-step-1", "hello"); err != nil || text != "hello (tuned) " {
		t.Errorf("its checkpoint: %q, %v", text, err)
	}
	log, err := os.ReadFile(filepath.Join(a.cfg.DataDir, "jobs", job.ID, "a1", trainerLog))
	if err != nil || !strings.Contains(string(log), "small trainer") {
		t.Errorf("the trainer's log: %q, %v", log, err)
	}
	if _, err := client.DeleteFineTuneModel(t.Context(), job.FineTunedModel); err != nil {
		t.Error(err)
	}
	if _, err := chat(t, client, job.FineTunedModel, "hello"); !errors.As(err, &apiError) || apiError.HTTPStatusCode != 404 {
		t.Errorf("the deleted model: %v", err)
	}

	if err := a.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if left := children(t); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
	if left, err := os.ReadDir(filepath.Join(a.cfg.DataDir, "run")); err != nil || len(left) > 0 {
		t.Errorf("sockets %v are left, %v", left, err)
	}
	if _, err := new(net.Dialer).DialContext(t.Context(), "tcp", a.Addr()); err == nil {
		t.Error("the port is still open")
	}
}

// TestIdleJobs looks at what a job would do, on a server that starts none.
func TestIdleJobs(t *testing.T) {
	cfg := config(t)
	before, openaiClient := start(t, cfg)
	id := endlessJob(t, before, openaiClient)
	if err := before.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := New(cfg, Options{Env: []string{smallRoles}, IdleJobs: true})
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	c := client.New("http://"+a.Addr()+"/v1", "")
	file, err := c.UploadFile(t.Context(), "train.jsonl", []byte(`{"text":"a"}`))
	if err != nil {
		t.Fatal(err)
	}
	result, err := c.DryRun(t.Context(), client.FineTuningJobRequest{Model: "small", TrainingFile: file.ID})
	if err != nil || result.TrainTokens != 8 || !strings.Contains(string(result.Plan), `"total_steps":1`) {
		t.Errorf("dry run %+v, %v", result, err)
	}
	if job, err := c.Job(t.Context(), id); err != nil || job.Hone.Attempt != 1 || len(children(t)) != 0 {
		t.Errorf("the job goes on: %+v, %v, processes %v", job, err, children(t))
	}
}

func waitForJob(t *testing.T, client *openai.Client, id string, done func(openai.FineTuningJob) bool) openai.FineTuningJob {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		job, err := client.RetrieveFineTuningJob(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if done(job) {
			return job
		}
		if time.Now().After(deadline) {
			t.Fatalf("job %+v does not get on", job)
		}
	}
}

func endlessJob(t *testing.T, a *App, client *openai.Client) string {
	t.Helper()
	file, err := client.CreateFileBytes(t.Context(), openai.FileBytesRequest{
		Name: "train.jsonl", Purpose: openai.PurposeFineTune,
		Bytes: []byte(`{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}` + "\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	body := strings.NewReader(`{"model":"small","training_file":"` + file.ID + `","hone":{"max_steps":1000000}}`)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+a.Addr()+"/v1/fine_tuning/jobs", body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var job openai.FineTuningJob
	if err := json.NewDecoder(resp.Body).Decode(&job); err != nil || job.ID == "" {
		t.Fatalf("create: %s, %v", resp.Status, err)
	}
	waitForJob(t, client, job.ID, func(job openai.FineTuningJob) bool { return job.Status == "running" && len(children(t)) > 0 })
	return job.ID
}

// TestCancel cancels a job whose trainer does not listen.
func TestCancel(t *testing.T) {
	a, client := start(t, config(t))
	id := endlessJob(t, a, client)
	began := time.Now()
	job, err := client.CancelFineTuningJob(t.Context(), id)
	if err != nil || job.Status != "cancelled" {
		t.Errorf("cancelled %+v, %v", job, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("cancelling took %s", took)
	}
	if left := children(t); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
}

// TestStopAndGoOn stops a server with a job and starts another over its data directory.
func TestStopAndGoOn(t *testing.T) {
	cfg := config(t)
	a, client := start(t, cfg)
	id := endlessJob(t, a, client)
	hurry, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_ = a.Stop(hurry) // it says that the trainer had to be killed
	if left := children(t); len(left) > 0 {
		t.Fatalf("processes %v are left", left)
	}
	again := New(cfg, Options{Env: []string{smallRoles}})
	if err := again.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		hurry, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		_ = again.Stop(hurry)
	}()
	next := openai.DefaultConfig("key")
	next.BaseURL = "http://" + again.Addr() + "/v1"
	waitForJob(t, openai.NewClientWithConfig(next), id, func(job openai.FineTuningJob) bool { return job.Status == "running" && len(children(t)) > 0 })
}

// TestStopDuringAStream ends a stream that takes longer than the grace: its client is told.
func TestStopDuringAStream(t *testing.T) {
	cfg := config(t)
	cfg.ShutdownGrace = 100 * time.Millisecond
	a, client := start(t, cfg)
	stream, err := client.CreateChatCompletionStream(t.Context(), openai.ChatCompletionRequest{
		Model: "small", Messages: []openai.ChatCompletionMessage{{Role: "user", Content: "one slow"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for range 2 { // the role, then the word
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	stopped := make(chan error)
	go func() { stopped <- a.Stop(context.Background()) }()
	apiError := new(openai.APIError)
	if _, err := stream.Recv(); !errors.As(err, &apiError) || apiError.Code != "shutting_down" {
		t.Errorf("the stream ended with %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if left := children(t); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
}

func TestStartErrors(t *testing.T) {
	cfg := config(t)
	a, _ := start(t, cfg)

	inUse := new(store.InUseError)
	if err := New(cfg, Options{}).Start(t.Context()); !errors.As(err, &inUse) || inUse.PID != os.Getpid() {
		t.Errorf("data directory in use: %v", err)
	}
	other := config(t)
	_, port, err := net.SplitHostPort(a.Addr())
	if err != nil {
		t.Fatal(err)
	}
	if other.Port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	if err := New(other, Options{}).Start(t.Context()); err == nil || !strings.Contains(err.Error(), "port "+port+" is in use; choose another with --port") {
		t.Errorf("port in use: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	below := config(t)
	below.DataDir = filepath.Join(file, "data")
	if err := New(below, Options{}).Start(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be used") {
		t.Errorf("data directory below a file: %v", err)
	}
	unknown := config(t)
	unknown.DefaultModel = "no-such-model"
	if err := New(unknown, Options{}).Start(t.Context()); err == nil || !strings.Contains(err.Error(), "default_model") {
		t.Errorf("unknown default model: %v", err)
	}
	if err := New(config(t), Options{}).Stop(t.Context()); err != nil {
		t.Errorf("Stop before Start: %v", err)
	}
}
