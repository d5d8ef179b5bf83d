package train

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/modeltest"
)

// tinyJob is a job of 10 rows on the tiny model: 3 epochs of 3 steps.
func tinyJob(t *testing.T) child.TrainerConfig {
	t.Helper()
	dir := t.TempDir()
	model := filepath.Join(dir, "model")
	if err := os.Mkdir(model, 0o700); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("testdata/tiny-llama-q4_1.gguf")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(model, "base.gguf"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return child.TrainerConfig{
		JobID: "ftjob-test", Attempt: 1, ModelDir: model, BaseModel: "tiny", BaseDigest: strings.Repeat("ab", 32),
		TrainingFile: writeRows(t, dir, "train.jsonl", 10), ValidationFile: writeRows(t, dir, "valid.jsonl", 4),
		Dir: filepath.Join(dir, "a1"), AdapterDir: filepath.Join(dir, "adapter"), AdapterID: "test", AdapterName: "ft:tiny:local::test",
		Seed: 42, Threads: 1,
		Options: child.TrainOptions{R: ptr(4), NumTrainEpochs: ptr(3), BatchSize: ptr(4), LearningRate: ptr(2e-3), SaveMinutes: ptr(0.0)},
	}
}

func ptr[T any](v T) *T { return &v }

func writeRows(t *testing.T, dir, name string, n int) string {
	t.Helper()
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `{"messages":[{"role":"user","content":"问 %d: %s"},{"role":"assistant","content":"%c"}]}`+"\r\n", i, strings.Repeat("word ", i%4), 'A'+i%4)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("\ufeff"+b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// runJob runs an attempt and sends "stop" once it has reported stopAt steps (never if stopAt is 0).
func runJob(t *testing.T, config child.TrainerConfig, stopAt int) []child.TrainerEvent {
	t.Helper()
	commands, stop := io.Pipe()
	defer stop.Close()
	events, out := io.Pipe()
	failed := make(chan error, 1)
	go func() {
		err := Run(t.Context(), config, commands, out)
		out.Close()
		failed <- err
	}()
	var list []child.TrainerEvent
	lines := bufio.NewScanner(events)
	for lines.Scan() {
		var e child.TrainerEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatalf("event %s: %v", lines.Text(), err)
		}
		list = append(list, e)
		if e.Type == child.EventStep && e.Step == stopAt {
			fmt.Fprintln(stop, `{"op":"stop"}`)
		}
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	return list
}

func eventsOf(list []child.TrainerEvent, kind string) []child.TrainerEvent {
	return slices.DeleteFunc(slices.Clone(list), func(e child.TrainerEvent) bool { return e.Type != kind })
}

func digest(t *testing.T, dir, name string) [32]byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(data)
}

// TestResumeIsBitForBit stops a job in the middle of an epoch and goes on in a second attempt: losses and the final
// adapter are those of a job that was left alone, to the last bit.
func TestResumeIsBitForBit(t *testing.T) {
	whole := tinyJob(t)
	alone := runJob(t, whole, 0)
	if n := len(eventsOf(alone, child.EventStep)); n != 9 {
		t.Fatalf("%d steps, expected 9", n)
	}
	if n := len(eventsOf(alone, child.EventEval)); n != 3 {
		t.Fatalf("%d evaluations, expected 3", n)
	}
	if n := len(eventsOf(alone, child.EventDone)); n != 1 {
		t.Fatalf("%d done events, expected 1", n)
	}

	cut := tinyJob(t)
	first := runJob(t, cut, 4)
	if len(eventsOf(first, child.EventDone)) != 0 {
		t.Fatal("the stopped attempt is done")
	}
	// The number of threads changes nothing. The server was killed before it had written down more than two steps: the others
	// are reported again.
	cut.Attempt, cut.ResumeFrom, cut.Dir, cut.Threads = 2, []string{cut.Dir}, cut.Dir+"-2", 3
	cut.ReportedStep = 2
	second := runJob(t, cut, 0)
	plan := eventsOf(second, child.EventPlan)[0].Plan
	if plan.ResumedStep < 4 {
		t.Errorf("resumed at step %d, expected at least 4", plan.ResumedStep)
	}
	steps := append(eventsOf(first, child.EventStep)[:2], eventsOf(second, child.EventStep)...)
	if diff := cmp.Diff(eventsOf(alone, child.EventStep), steps); diff != "" {
		t.Errorf("steps (-alone +resumed):\n%s", diff)
	}
	if diff := cmp.Diff(eventsOf(alone, child.EventEval), eventsOf(second, child.EventEval)); diff != "" {
		t.Errorf("evaluations (-alone +resumed):\n%s", diff)
	}
	for _, name := range []string{lora.GGUFFile, lora.PEFTWeights} {
		if digest(t, whole.AdapterDir, name) != digest(t, cut.AdapterDir, name) {
			t.Errorf("%s differs from that of the job that was left alone", name)
		}
	}
}

// A resumed job keeps the plan that it began with, even where another would be made now, and ends as if left alone.
func TestResumeKeepsThePlan(t *testing.T) {
	whole := tinyJob(t)
	want := *eventsOf(runJob(t, whole, 0), child.EventPlan)[0].Plan
	cut := tinyJob(t)
	runJob(t, cut, 4)
	cut.Attempt, cut.ResumeFrom, cut.Dir = 2, []string{cut.Dir}, cut.Dir+"-2"
	cut.MemoryBytes = 1 << 20 // a new job would be refused
	got := *eventsOf(runJob(t, cut, 0), child.EventPlan)[0].Plan
	if got.ResumedStep < 4 {
		t.Errorf("resumed at step %d, expected at least 4", got.ResumedStep)
	}
	// What was free, and the size of the process, are other numbers in each attempt.
	got.ResumedStep, got.Memory.FreeBytes, got.Memory.OverheadBytes, got.Memory.TotalBytes = want.ResumedStep, want.Memory.FreeBytes, want.Memory.OverheadBytes, want.Memory.TotalBytes
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("plan (-alone +resumed):\n%s", diff)
	}
	if digest(t, whole.AdapterDir, lora.PEFTWeights) != digest(t, cut.AdapterDir, lora.PEFTWeights) {
		t.Error("the adapter differs from that of the job that was left alone")
	}
}

// A damaged newest resume state is passed over, with a warning, for the one before.
func TestDamagedResumeStateIsSkipped(t *testing.T) {
	for file, damage := range map[string]func(data []byte) []byte{
		stateFile: func(data []byte) []byte {
			data[len(data)/2] ^= 1
			return data
		},
		manifestFile: func(data []byte) []byte { // a number that only its sha256 betrays
			return bytes.Replace(data, []byte(`"trained_tokens":`), []byte(`"trained_tokens":1`), 1)
		},
	} {
		t.Run(file, func(t *testing.T) { skipsDamagedState(t, file, damage) })
	}
}

func skipsDamagedState(t *testing.T, file string, damage func(data []byte) []byte) {
	t.Helper()
	config := tinyJob(t)
	runJob(t, config, 4)
	states, err := statesIn(config.Dir)
	if err != nil || len(states) != keptStates {
		t.Fatalf("resume states %v, %v: expected %d", states, err, keptStates)
	}
	path := filepath.Join(states[0], file)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, damage(data), 0o600); err != nil {
		t.Fatal(err)
	}
	config.ResumeFrom, config.Dir = []string{config.Dir}, config.Dir+"-2"
	events := runJob(t, config, 0)
	logs := slices.DeleteFunc(eventsOf(events, child.EventLog), func(e child.TrainerEvent) bool { return e.Level != "warn" })
	if len(logs) != 1 || !strings.Contains(logs[0].Message, "damaged") {
		t.Errorf("log events %+v, expected one about the damaged state", logs)
	}
	if len(eventsOf(events, child.EventDone)) != 1 {
		t.Error("the job is not done")
	}
}

func TestOrphanedTrainerEnds(t *testing.T) {
	config := tinyJob(t)
	config.Options.NumTrainEpochs = ptr(1000)
	began := time.Now()
	err := Run(t.Context(), config, strings.NewReader(""), io.Discard)
	if err == nil || !strings.Contains(err.Error(), "gone") {
		t.Errorf("error %v, expected that the server is gone", err)
	}
	if time.Since(began) > time.Minute {
		t.Error("took longer than a minute")
	}
}

func TestJobsThatCannotSucceedFailByName(t *testing.T) {
	broken := func(text string) func(t *testing.T, c *child.TrainerConfig) {
		return func(t *testing.T, c *child.TrainerConfig) {
			if err := os.WriteFile(c.TrainingFile, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		spoil             func(t *testing.T, c *child.TrainerConfig)
		code, param, text string
	}{
		"broken line":  {broken(`{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}` + "\n{\n"), "invalid_training_file", "training_file", "line 2"},
		"empty file":   {broken("\n"), "invalid_training_file", "training_file", "empty"},
		"no assistant": {broken(`{"messages":[{"role":"user","content":"x"}]}`), "invalid_training_file", "training_file", "line 1"},
		"too long":     {func(_ *testing.T, c *child.TrainerConfig) { c.Options.MaxLength = ptr(3) }, "invalid_training_file", "training_file", "max_length"},
		"max_length":   {func(_ *testing.T, c *child.TrainerConfig) { c.Options.MaxLength = ptr(1 << 20) }, child.CodeInvalidRequest, "hone.max_length", "512 tokens"},
		"rank":         {func(_ *testing.T, c *child.TrainerConfig) { c.Options.R = ptr(0) }, child.CodeInvalidRequest, "hone.r", "1 to 256"},
		"target":       {func(_ *testing.T, c *child.TrainerConfig) { c.Options.TargetModules = []string{"lm_head"} }, child.CodeInvalidRequest, "hone.target_modules", "lm_head"},
		"device": {func(t *testing.T, c *child.TrainerConfig) {
			t.Setenv("HONE_LIB", t.TempDir()) // no library of a GPU there
			c.Options.Device = ptr("cuda")
		}, child.CodeInvalidRequest, "hone.device", "cuda cannot be used"},
		"missing model": {func(t *testing.T, c *child.TrainerConfig) { c.ModelDir = t.TempDir() }, child.CodeInvalidModel, "model", "base.gguf"},
		"diverging": {func(_ *testing.T, c *child.TrainerConfig) {
			c.Options.LearningRate = ptr(1.0)
			c.Options.LoraAlpha = ptr(1e30)
		}, "training_diverged", "hone.learning_rate", "lower learning_rate"},
	} {
		t.Run(name, func(t *testing.T) {
			config := tinyJob(t)
			test.spoil(t, &config)
			failed := eventsOf(runJob(t, config, 0), child.EventFailed)
			if len(failed) != 1 {
				t.Fatalf("%d failed events, expected 1", len(failed))
			}
			e := failed[0].Error
			if e.Code != test.code || e.Param != test.param || !strings.Contains(e.Message, test.text) {
				t.Errorf("got %+v, expected code %s, param %s and %q in the message", e, test.code, test.param, test.text)
			}
			if _, err := os.Stat(config.AdapterDir); err == nil {
				t.Error("an adapter was written")
			}
		})
	}
}

// TestServedLogits exports adapters and compares the logits of llama.cpp, which serves them, with the trainer's.
// llama.cpp rounds activations to 8 bits where it multiplies quantised weights, so the base alone differs too: the
// adapter must not add to that.
func TestServedLogits(t *testing.T) {
	for name, path := range map[string]string{"tiny": "testdata/tiny-llama-q4_1.gguf", "default model": modeltest.Path(t)} {
		t.Run(name, func(t *testing.T) {
			_, model := loadModel(t, path, graph.ExactLayout(), 2)
			tuning, exported := randomAdapter(t, model)
			served, err := llama.LoadModel(path, llama.ModelOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer served.Close()
			adapter, err := llama.LoadAdapter(served, filepath.Join(exported, lora.GGUFFile))
			if err != nil {
				t.Fatal(err)
			}
			defer adapter.Free()
			var base, tuned, moved float64
			random := rand.New(rand.NewPCG(10, 11))
			for range 5 {
				b := engine.Batch{Segments: engine.Rows(30), Targets: []engine.Target{{Position: 29, Weight: 1}}}
				for range 30 {
					b.Tokens = append(b.Tokens, engine.Token(random.IntN(model.Vocabulary)))
				}
				base = max(base, maxDifference(t, servedLogits(t, served, nil, b.Tokens), trainerLogits(t, model, b, nil)))
				tuned = max(tuned, maxDifference(t, servedLogits(t, served, adapter, b.Tokens), trainerLogits(t, model, b, tuning)))
				moved = max(moved, maxDifference(t, trainerLogits(t, model, b, tuning), trainerLogits(t, model, b, nil)))
			}
			t.Logf("largest difference of a served logit from the trainer's: base %.3f, tuned %.3f; the adapter moves logits by up to %.2f", base, tuned, moved)
			if tuned > 1.5*base+0.1 || tuned > moved/3 {
				t.Errorf("served and trained logits differ by %g with the adapter, by %g without; the adapter moves them by %g", tuned, base, moved)
			}
		})
	}
}

// randomAdapter makes an adapter of all modules with random weights, and exports it to the returned directory.
func randomAdapter(t *testing.T, model *graph.Model) (adapter *graph.LoRA, dir string) {
	t.Helper()
	options := graph.LoRAOptions{Rank: 5, Alpha: 12, Modules: graph.AllLinear}
	adapter, err := model.NewLoRA(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(adapter.Close)
	initialise(adapter, "true", 3)
	random := rand.New(rand.NewPCG(8, 9))
	w := lora.Weights{
		Manifest: lora.Manifest{
			ID: "random", Name: "ft:base:local::random", BaseModel: "base", BaseDigest: strings.Repeat("0a", 32), JobID: "ftjob-random",
			Rank: options.Rank, Alpha: options.Alpha, MaxLength: 100,
		},
		Architecture: "llama", Heads: model.Heads.Query, KVHeads: model.Heads.KeyValue,
	}
	for _, p := range adapter.Parts {
		for i := range options.Rank * p.Out {
			adapter.Parameters[p.B+i] = float32(random.NormFloat64() * 0.05)
		}
		a, b := adapter.Matrices(adapter.Parameters, p)
		w.Modules = append(w.Modules, lora.Module{Layer: p.Layer, Name: p.Module.String(), In: p.In, Out: p.Out, A: a, B: b})
	}
	dir = filepath.Join(t.TempDir(), "adapter")
	if err := lora.Export(dir, w); err != nil {
		t.Fatal(err)
	}
	return adapter, dir
}

// servedLogits are llama.cpp's after the last token; adapter nil is the base model.
func servedLogits(t *testing.T, m *llama.Model, adapter *llama.Adapter, tokens []engine.Token) []float32 {
	t.Helper()
	context, err := llama.NewContext(m, llama.ContextOptions{Tokens: 512, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer context.Close()
	if adapter != nil {
		if err := context.SetAdapter(adapter, 1); err != nil {
			t.Fatal(err)
		}
	}
	batch := llama.NewBatch(len(tokens))
	defer batch.Close()
	row := 0
	for i, token := range tokens {
		row = batch.Add(token, i, 0, i == len(tokens)-1)
	}
	if err := context.Decode(batch); err != nil {
		t.Fatal(err)
	}
	return slices.Clone(context.Logits(row))
}

func trainerLogits(t *testing.T, m *graph.Model, b engine.Batch, l *graph.LoRA) []float32 {
	t.Helper()
	logits, err := m.Logits(b, l)
	if err != nil {
		t.Fatal(err)
	}
	return logits[0]
}

func maxDifference(t *testing.T, a, b []float32) float64 {
	t.Helper()
	if len(a) != len(b) {
		t.Fatalf("%d and %d logits", len(a), len(b))
	}
	worst := 0.0
	for i := range a {
		worst = max(worst, math.Abs(float64(a[i]-b[i])))
	}
	return worst
}

func TestPlan(t *testing.T) {
	const weights = 134_515_008
	all := []string{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
	auto := child.TrainPlan{
		R: 16, LoraAlpha: 32, LoraDropout: 0.05, TargetModules: all, LearningRate: 1e-3, LearningRateMultiplier: 1, NumTrainEpochs: 3, BatchSize: 4,
		WarmupSteps: 39, LRScheduler: "cosine", AdamBeta1: 0.9, AdamBeta2: 0.999, AdamEpsilon: 1e-8, MaxGradNorm: 1, MaxLength: 2048, TotalSteps: 384, Seed: 1,
		Method: "supervised", InitLoraWeights: "true", LongRows: "drop", EvalStrategy: "no", SaveStrategy: "epoch", SaveTotalLimit: 3, LoggingSteps: 1,
		MetricForBestModel: "loss",
	}
	student := auto
	student.R, student.LoraAlpha, student.TargetModules, student.LearningRate, student.LearningRateMultiplier = 8, 16, []string{"q_proj", "v_proj"}, 2e-4, 0.2
	few := auto
	few.NumTrainEpochs, few.BatchSize, few.TotalSteps, few.WarmupSteps = 10, 1, 200, 20
	preferences := auto
	preferences.Method, preferences.Beta, preferences.LossType, preferences.LearningRate = "dpo", 0.1, "sigmoid", 1e-4
	limited := auto
	limited.NumTrainEpochs, limited.TotalSteps, limited.WarmupSteps = 1, 5, 1
	for name, test := range map[string]struct {
		options child.TrainOptions
		rows    int
		want    child.TrainPlan
	}{
		"auto":       {child.TrainOptions{}, 510, auto},
		"dpo":        {child.TrainOptions{}, 510, preferences},
		"all-linear": {child.TrainOptions{TargetModules: []string{"all-linear"}}, 510, auto},
		"few rows":   {child.TrainOptions{}, 20, few},
		"max_steps":  {child.TrainOptions{MaxSteps: ptr(5)}, 510, limited},
		"first user": {child.TrainOptions{R: ptr(8), TargetModules: []string{"q_proj", "v_proj"}, LearningRate: ptr(2e-4)}, 510, student},
	} {
		f := facts{Rows: test.rows, Weights: weights, MaxLength: 2048, Layers: 30, Seed: 1}
		if test.want.Method == methodDPO {
			f.Method = methodDPO
		}
		got, err := NewPlan(test.options, f)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got.LearningRateMultiplier = math.Round(got.LearningRateMultiplier*1e9) / 1e9
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if rate := AutoLearningRate(8e9); rate != 1.3e-4 {
		t.Errorf("rate for 8 billion weights: %g", rate)
	}
}

// A trainer says something at least every two seconds, also while one step computes.
func TestProgressInsideAStep(t *testing.T) {
	config := tinyJob(t)
	config.Options.NumTrainEpochs, config.Options.SaveMinutes = ptr(100000), nil
	commands, stop := io.Pipe()
	defer stop.Close()
	var out bytes.Buffer
	time.AfterFunc(2500*time.Millisecond, func() { fmt.Fprintln(stop, `{"op":"stop"}`) })
	if err := Run(t.Context(), config, commands, &out); err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(out.String()) {
		var e child.TrainerEvent
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Type == child.EventProgress && e.Step > 0 {
			n++
			if e.TokensPerSecond <= 0 || e.SecondsLeft <= 0 || e.TotalSteps == 0 {
				t.Errorf("progress %+v", e)
			}
		}
	}
	if n == 0 {
		t.Error("no progress event in 2.5 s")
	}
}
