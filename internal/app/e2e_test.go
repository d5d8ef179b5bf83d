//go:build cgo

package app_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	openai "github.com/sashabaranov/go-openai"

	"golang.org/x/text/encoding/simplifiedchinese"

	"github.com/hone-llm/hone/client"
	"github.com/hone-llm/hone/internal/app"
	"github.com/hone-llm/hone/internal/cli"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/wire"
)

// These tests run the whole command, as processes, on the default model.

// init makes the test binary the hone command, for the processes that the tests and the server start.
func init() {
	app.RealRoles = func(args []string) (int, bool) {
		switch args[0] {
		case "serve", "runner", "trainer", "dataset", "finetune", "predict":
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return cli.Run(ctx, args, os.Stdin, os.Stdout, os.Stderr), true
		}
		return 0, false
	}
}

const model = "SmolLM2-135M-Instruct"

// home makes a data directory with the default model.
func home(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	store, err := models.Open(filepath.Join(dir, "models"), models.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Add(t.Context(), modeltest.Path(t), models.AddOptions{Name: model}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// hone is a running `hone serve`.
type hone struct {
	cmd    *exec.Cmd
	url    string
	client *openai.Client
}

// serve starts a server on a free port. It is killed when the test ends.
func serve(t *testing.T, dir string) *hone {
	t.Helper()
	h := &hone{cmd: exec.CommandContext(context.WithoutCancel(t.Context()), os.Args[0], "serve", "--port", "0", "--data-dir", dir)}
	h.cmd.Env = append(os.Environ(), "HONE_LOG_LEVEL=debug")
	h.cmd.Stderr = t.Output()
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the server said %q: %v", line, err)
	}
	h.url = strings.TrimSpace(strings.TrimPrefix(line, "listening on "))
	config := openai.DefaultConfig("key")
	config.BaseURL = h.url + "/v1"
	h.client = openai.NewClientWithConfig(config)
	return h
}

// kill ends the server without a warning.
func (h *hone) kill() {
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

// children returns the process ids of the server's children in this role.
func (h *hone) children(t *testing.T, role string) []int {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, path := range processes {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		_, after, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(after) // state, parent
		if len(fields) < 2 || fields[0] == "Z" || fields[1] != strconv.Itoa(h.cmd.Process.Pid) {
			continue
		}
		command, err := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		if err != nil || !strings.HasSuffix(string(command), "\x00"+role+"\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, pid)
	}
	return found
}

// post sends JSON and decodes the answer into v.
func (h *hone) post(t *testing.T, path, body string, v any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, h.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	h.do(t, req, v)
}

func (h *hone) do(t *testing.T, req *http.Request, v any) {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %s %s", req.Method, req.URL, resp.Status, data)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%s %s: %v: %s", req.Method, req.URL, err, data)
	}
}

// job waits until done holds of a job.
func (h *hone) job(t *testing.T, id string, done func(wire.FineTuningJob) bool) wire.FineTuningJob {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, h.url+"/v1/fine_tuning/jobs/"+id, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		var job wire.FineTuningJob
		h.do(t, req, &job)
		if done(job) {
			return job
		}
		if job.FinishedAt != nil || time.Now().After(deadline) {
			t.Fatalf("the job does not get there: %+v, %+v", job, job.Error)
		}
	}
}

// upload stores rows that all answer with the same word.
func (h *hone) upload(t *testing.T, rows int) string {
	t.Helper()
	var data strings.Builder
	for i := range rows {
		fmt.Fprintf(&data, `{"messages":[{"role":"user","content":"Question %d"},{"role":"assistant","content":"banana"}]}`+"\n", i)
	}
	file, err := h.client.CreateFileBytes(t.Context(), openai.FileBytesRequest{Name: "train.jsonl", Bytes: []byte(data.String()), Purpose: openai.PurposeFineTune})
	if err != nil {
		t.Fatal(err)
	}
	return file.ID
}

func say(prompt string) []openai.ChatCompletionMessage {
	return []openai.ChatCompletionMessage{{Role: openai.ChatMessageRoleUser, Content: prompt}}
}

// read returns the text of a stream and the error at its end, which is io.EOF for a whole one.
func read(t *testing.T, h *hone, req openai.ChatCompletionRequest, each func(text string)) (string, error) {
	t.Helper()
	stream, err := h.client.CreateChatCompletionStream(t.Context(), req)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	var text string
	for {
		chunk, err := stream.Recv()
		if err != nil {
			return text, err
		}
		for _, choice := range chunk.Choices {
			text += choice.Delta.Content
		}
		each(text)
	}
}

func TestEndToEndChat(t *testing.T) {
	h := serve(t, home(t))
	request := openai.ChatCompletionRequest{Model: model, Messages: say("Say hello."), MaxCompletionTokens: 6, Temperature: math.SmallestNonzeroFloat32}
	whole, err := h.client.CreateChatCompletion(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	want := whole.Choices[0].Message.Content
	if got, err := read(t, h, request, func(string) {}); !errors.Is(err, io.EOF) || got != want || want == "" {
		t.Errorf("streamed %q (%v), whole %q", got, err, want)
	}

	var choice wire.ChatCompletion
	h.post(t, "/v1/chat/completions", `{"model":"`+model+`","messages":[{"role":"user","content":"A or B?"}],"guided_choice":["A","B","C"],"logprobs":true,"top_logprobs":3}`, &choice)
	answer, sum := choice.Choices[0], 0.0
	for _, top := range answer.LogProbs.Content[0].TopLogProbs {
		sum += math.Exp(top.LogProb)
	}
	if !strings.Contains("ABC", *answer.Message.Content) || *answer.Message.Content == "" || math.Abs(sum-1) > 1e-3 {
		t.Errorf("choice %+v with probabilities that sum to %v", answer, sum)
	}

	apiError := new(openai.APIError)
	long := openai.ChatCompletionRequest{Model: model, Messages: say(strings.Repeat("word ", 20_000))}
	if _, err := h.client.CreateChatCompletion(t.Context(), long); !errors.As(err, &apiError) || apiError.Code != "context_length_exceeded" || apiError.HTTPStatusCode != http.StatusBadRequest {
		t.Errorf("a prompt that is too long: %v", err)
	}

	runners := h.children(t, "runner")
	if len(runners) != 1 {
		t.Fatalf("runners %v, want one", runners)
	}
	request.MaxCompletionTokens = 500
	killed := false
	_, err = read(t, h, request, func(string) {
		if !killed {
			killed = true
			_ = syscall.Kill(runners[0], syscall.SIGKILL)
		}
	})
	if !errors.As(err, &apiError) || apiError.Code != "runner_ended" {
		t.Errorf("the stream of a killed runner ended with %v", err)
	}
	request.MaxCompletionTokens = 6
	if again, err := h.client.CreateChatCompletion(t.Context(), request); err != nil || again.Choices[0].Message.Content != want {
		t.Errorf("after the runner was killed: %+v, %v, want %q", again.Choices, err, want)
	}
	runners = h.children(t, "runner")
	h.kill()
	for _, pid := range runners {
		for deadline := time.Now().Add(5 * time.Second); running(pid); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("runner %d outlived its server", pid)
			}
		}
	}
}

func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// TestEndToEndJob tunes, kills the server in the middle, tunes on, and asks the tuned model beside the base.
func TestEndToEndJob(t *testing.T) {
	dir := home(t)
	h := serve(t, dir)
	file := h.upload(t, 16)
	var job wire.FineTuningJob
	h.post(t, "/v1/fine_tuning/jobs", `{"model":"`+model+`","training_file":"`+file+`","suffix":"fruit","seed":1,
		"hone":{"r":8,"learning_rate":2e-3,"batch_size":4,"num_train_epochs":4,"lora_dropout":0,"max_length":128,"save_minutes":0.001}}`, &job)
	// A state is saved after every step or so; the first is on disk before the third step is done.
	h.job(t, job.ID, func(j wire.FineTuningJob) bool { return j.Hone.Progress != nil && j.Hone.Progress.Step >= 3 })
	h.kill()

	h = serve(t, dir)
	job = h.job(t, job.ID, func(j wire.FineTuningJob) bool { return j.FinishedAt != nil && j.Status == "succeeded" })
	var plan struct {
		ResumedStep int `json:"resumed_step"`
		TotalSteps  int `json:"total_steps"`
	}
	if err := json.Unmarshal(job.Hone.Plan, &plan); err != nil || plan.ResumedStep == 0 || plan.TotalSteps != 16 || job.Hone.Attempt < 2 {
		t.Errorf("attempt %d, plan %s, %v: want it to go on from a later step", job.Hone.Attempt, job.Hone.Plan, err)
	}
	if job.Error != nil || len(job.ResultFiles) != 2 || job.TrainedTokens == nil || *job.TrainedTokens == 0 {
		t.Errorf("job %+v", job)
	}

	request := openai.ChatCompletionRequest{Model: model, Messages: say("Question 3"), MaxCompletionTokens: 6, Temperature: math.SmallestNonzeroFloat32}
	base, err := h.client.CreateChatCompletion(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	runners := h.children(t, "runner")
	request.Model = *job.FineTunedModel
	tuned, err := h.client.CreateChatCompletion(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	if got := tuned.Choices[0].Message.Content; got != "banana" || base.Choices[0].Message.Content == got {
		t.Errorf("the tuned model says %q, the base %q; want banana from the tuned one", got, base.Choices[0].Message.Content)
	}
	if again := h.children(t, "runner"); len(runners) != 1 || len(again) != 1 || runners[0] != again[0] {
		t.Errorf("runners %v, then %v: want the tuned model beside the base in one", runners, again)
	}

	// A job that would take long is cancelled within 2 s and leaves no trainer.
	h.post(t, "/v1/fine_tuning/jobs", `{"model":"`+model+`","training_file":"`+file+`","hone":{"num_train_epochs":50}}`, &job)
	h.job(t, job.ID, func(j wire.FineTuningJob) bool { return j.Status == "running" && len(h.children(t, "trainer")) == 1 })
	began := time.Now()
	cancelled, err := h.client.CancelFineTuningJob(t.Context(), job.ID)
	if err != nil || cancelled.Status != "cancelled" {
		t.Errorf("cancelled %+v, %v", cancelled, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("cancelling took %s", took)
	}
	if left := h.children(t, "trainer"); len(left) > 0 {
		t.Errorf("trainers %v are left", left)
	}

	if err := h.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := h.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM the server ended with %v, want code 0", err)
	}
}

// command runs hone with these arguments against the server and returns what it prints.
func (h *hone) command(t *testing.T, args ...string) (out, log string) {
	t.Helper()
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), "HONE_BASE_URL="+h.url+"/v1")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("hone %s: %v\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), stderr.String()
}

// TestEndToEndCommands is what a user does at a terminal: make rows of questions, look at what a job would do, train, predict,
// list, cancel. The accuracy that the job reports of its validation rows is the one that the predictor has on their questions.
func TestEndToEndCommands(t *testing.T) {
	h := serve(t, home(t))
	dir := t.TempDir()
	all, err := os.ReadFile("../../examples/mcq/train.csv")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(all), "\n")
	for name, part := range map[string][]string{"train": lines[61:221], "valid": lines[1:61]} {
		csv := filepath.Join(dir, name+".csv")
		if err := os.WriteFile(csv, []byte(lines[0]+strings.Join(part, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		h.command(t, "dataset", "mcq", "--in", csv, "--out", filepath.Join(dir, name+".jsonl"), "--valid", "0")
	}
	job := []string{"finetune", "create", filepath.Join(dir, "train.jsonl"), "--model", model, "--validation-file", filepath.Join(dir, "valid.jsonl"),
		"--choices", "A,B,C,D", "--r", "8", "--max-steps", "30", "--batch-size", "4", "--seed", "1"}
	out, _ := h.command(t, append(job, "--dry-run")...)
	for _, want := range []string{"30, in ", "validation", "Nothing was started.", "MiB"} {
		if !strings.Contains(out, want) {
			t.Errorf("the dry run does not say %q:\n%s", want, out)
		}
	}
	out, _ = h.command(t, "finetune", "list")
	if !strings.Contains(out, "there are no jobs yet") {
		t.Errorf("after a dry run there are jobs:\n%s", out)
	}

	out, log := h.command(t, append(job, "--watch")...)
	id, tuned, _ := strings.Cut(strings.TrimSpace(out), "\n")
	if !strings.HasPrefix(id, "ftjob-") || !strings.HasPrefix(tuned, "ft:"+model) || !strings.Contains(log, "Fine-tuning job started") {
		t.Fatalf("create --watch printed %q and %q", out, log)
	}
	if out, _ := h.command(t, "finetune", "watch", id); out != tuned+"\n" {
		t.Errorf("watch prints %q, expected %q", out, tuned)
	}
	out, _ = h.command(t, "finetune", "checkpoints", id)
	fields := strings.Fields(out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:])
	reported, err := strconv.ParseFloat(fields[len(fields)-1], 64)
	if err != nil {
		t.Fatalf("checkpoints: %v\n%s", err, out)
	}
	out, _ = h.command(t, "predict", "--model", tuned, "--questions", filepath.Join(dir, "valid.csv"), "--out", filepath.Join(dir, "answers.csv"))
	var right, of int
	_, counts, _ := strings.Cut(out, "accuracy: ")
	_, counts, _ = strings.Cut(counts, "(")
	if _, err := fmt.Sscanf(counts, "%d of %d)", &right, &of); err != nil || of == 0 {
		t.Fatalf("predict printed %q: %v", out, err)
	}
	t.Logf("the job reports %g, the predictor has %d of %d right", reported, right, of)
	// The weights are rounded in other ways while training: one question may lie between.
	if got := float64(right) / float64(of); math.Abs(got-reported) > 1/float64(of)+1e-4 || of != 60 {
		t.Errorf("the job reports %g, the predictor has %g of %d questions; expected the same of 60", reported, got, of)
	}

	long := append(slices.Clone(job[:len(job)-6]), "--max-steps", "100000")
	out, _ = h.command(t, long...)
	id, _, _ = strings.Cut(strings.TrimSpace(out), "\n")
	if out, _ := h.command(t, "finetune", "cancel", id); out != id+" cancelled\n" {
		t.Errorf("cancel prints %q", out)
	}
	out, _ = h.command(t, "finetune", "list")
	if strings.Count(out, "ftjob-") != 2 || !strings.Contains(out, "cancelled") || !strings.Contains(out, tuned) {
		t.Errorf("list prints\n%s", out)
	}
}

// TestEndToEndChinesePrediction reads the Chinese questions from a GBK file, as a spreadsheet on Windows writes it, and
// has the default model answer them.
func TestEndToEndChinesePrediction(t *testing.T) {
	utf8, err := os.ReadFile("../../examples/mcq/zh.csv")
	if err != nil {
		t.Fatal(err)
	}
	gbk, err := simplifiedchinese.GBK.NewEncoder().Bytes(utf8)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "zh.csv")
	if err := os.WriteFile(path, gbk, 0o600); err != nil {
		t.Fatal(err)
	}
	questions, err := client.ReadQuestions(path, client.ReadOptions{Encoding: "gbk", NeedAnswer: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(questions) != 40 || !strings.HasPrefix(questions[0].Text, "下面哪一个") {
		t.Fatalf("%d questions, the first %+v", len(questions), questions[0])
	}
	h := serve(t, home(t))
	predictor, err := client.New(h.url+"/v1", "").NewPredictor(t.Context(), client.PredictorOptions{Model: model})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	err = predictor.Run(t.Context(), questions[:16], func(p client.Prediction) error {
		sum, best := 0.0, 0.0
		for _, probability := range p.Probabilities {
			sum += probability
			best = max(best, probability)
		}
		if p.Err != nil || p.Question.ID != questions[n].ID || math.Abs(sum-1) > 1e-3 || p.Confidence != best || !strings.Contains("ABCD", p.Answer) {
			t.Errorf("prediction %d: %+v", n, p)
		}
		n++
		return nil
	})
	if err != nil || n != 16 {
		t.Errorf("%d predictions, %v", n, err)
	}
}
