package train

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/lora"
)

// preferenceJob is a DPO job of 10 pairs on the tiny model.
func preferenceJob(t *testing.T) child.TrainerConfig {
	t.Helper()
	c := tinyJob(t)
	write := func(path string, n int) {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `{"prompt":"ask %d%s","chosen":" yes %c","rejected":" no, never"}`+"\n", i, strings.Repeat(" word", i%4), 'A'+i%4)
		}
		if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(c.TrainingFile, 10)
	write(c.ValidationFile, 4)
	c.Method = methodDPO
	return c
}

// Preferences are learned: rewards part, the accuracy rises to 1, and the loss begins at log 2, where the policy is the reference.
func TestPreferenceJob(t *testing.T) {
	config := preferenceJob(t)
	config.CacheDir = t.TempDir()
	config.Options.NumTrainEpochs, config.Options.LoraDropout = ptr(10), ptr(0.0)
	events := runJob(t, config, 0)
	steps, evals := eventsOf(events, child.EventStep), eventsOf(events, child.EventEval)
	if first := steps[0]; math.Abs(first.TrainLoss-math.Ln2) > 1e-5 || *first.RewardsChosen != 0 || *first.RewardsRejected != 0 {
		t.Errorf("first step: loss %g, rewards %g and %g; expected log 2, 0 and 0", first.TrainLoss, *first.RewardsChosen, *first.RewardsRejected)
	}
	last := evals[len(evals)-1]
	if !(last.ValidLoss < 0.6) || last.ValidChoiceAccuracy == nil || *last.ValidChoiceAccuracy != 1 {
		t.Errorf("last evaluation: %+v", last)
	}
	if end := steps[len(steps)-1]; !(*end.RewardsChosen > *end.RewardsRejected) {
		t.Errorf("last step: rewards %g of the preferred, %g of the other answers", *end.RewardsChosen, *end.RewardsRejected)
	}

	// The same again takes the references from the cache, whole or in part, and comes to the same.
	files, err := filepath.Glob(filepath.Join(config.CacheDir, "*.reference"))
	if err != nil || len(files) != 2 {
		t.Fatalf("files of references: %v, %v", files, err)
	}
	if err := os.Truncate(files[0], 7); err != nil {
		t.Fatal(err)
	}
	again := preferenceJob(t)
	again.CacheDir, again.TrainingFile, again.ValidationFile, again.Options = config.CacheDir, config.TrainingFile, config.ValidationFile, config.Options
	second := runJob(t, again, 0)
	if diff := cmp.Diff(steps, eventsOf(second, child.EventStep)); diff != "" {
		t.Errorf("steps with cached references (-first +second):\n%s", diff)
	}
	computed := func(list []child.TrainerEvent) (n int) {
		for _, e := range eventsOf(list, child.EventLog) {
			if strings.HasPrefix(e.Message, "Computing the reference") {
				n++
			}
		}
		return n
	}
	if a, b := computed(events), computed(second); a != 2 || b != 1 {
		t.Errorf("references were computed %d and then %d times, expected 2 and 1", a, b)
	}
}

// Training on choices alone, and the accuracy among them of ordinary training on few answers.
func TestChoiceJobs(t *testing.T) {
	for name, choices := range map[string][]string{"choices": {"A", "B", "C", "D"}, "few answers": nil} {
		t.Run(name, func(t *testing.T) {
			config := tinyJob(t)
			dir := filepath.Dir(config.TrainingFile)
			config.TrainingFile = writeRows(t, dir, "more.jsonl", 24)
			config.Options.Choices, config.Options.NumTrainEpochs, config.Options.LearningRate = choices, ptr(12), ptr(1e-2)
			config.Options.LoadBestModelAtEnd, config.Options.MetricForBestModel = ptr(true), ptr("choice_accuracy")
			events := runJob(t, config, 0)
			steps, evals := eventsOf(events, child.EventStep), eventsOf(events, child.EventEval)
			if len(evals) == 0 || evals[0].ValidChoiceAccuracy == nil {
				t.Fatalf("evaluations %+v: no choice accuracy", evals)
			}
			if (steps[0].ChoiceAccuracy != nil) != (choices != nil) {
				t.Errorf("first step: choice accuracy %v", steps[0].ChoiceAccuracy)
			}
			if first, last := evals[0], evals[len(evals)-1]; !(last.ValidLoss < first.ValidLoss) {
				t.Errorf("validation loss %g at first, %g at last", first.ValidLoss, last.ValidLoss)
			}
			manifest, err := lora.ReadManifest(config.AdapterDir)
			if err != nil || !slices.Equal(manifest.Choices, []string{"A", "B", "C", "D"}) {
				t.Errorf("choices of the manifest: %v, %v", manifest.Choices, err)
			}
		})
	}
}

// An evaluation with choices beside the rows has the loss of one without them.
func TestChoicesChangeNoLoss(t *testing.T) {
	loss := func(answers int) float64 {
		config := tinyJob(t)
		config.Options.NumTrainEpochs = ptr(1)
		config.TrainingFile = writeRows(t, filepath.Dir(config.TrainingFile), "rows.jsonl", answers)
		config.Options.MaxSteps, config.Options.LearningRate = ptr(1), ptr(1e-12)
		e := eventsOf(runJob(t, config, 0), child.EventEval)[0]
		if (e.ValidChoiceAccuracy != nil) != (answers > 7) {
			t.Errorf("%d rows: choice accuracy %v", answers, e.ValidChoiceAccuracy)
		}
		return e.ValidLoss
	}
	if a, b := loss(7), loss(8); math.Abs(a-b) > 1e-5 {
		t.Errorf("validation loss %g without choices, %g with", a, b)
	}
}

func TestLoggingSteps(t *testing.T) {
	config, rare := tinyJob(t), tinyJob(t)
	rare.Options.LoggingSteps = ptr(4)
	every := eventsOf(runJob(t, config, 0), child.EventStep)
	some := eventsOf(runJob(t, rare, 0), child.EventStep)
	if len(every) != 9 || len(some) != 3 {
		t.Fatalf("%d and %d events of steps, expected 9 and 3", len(every), len(some))
	}
	for i, last := range []int{4, 8, 9} {
		var mean float64
		first := 4 * i
		for _, e := range every[first:last] {
			mean += e.TrainLoss / float64(last-first)
		}
		if got := some[i]; got.Step != last || math.Abs(got.TrainLoss-mean) > 1e-12 || got.GradNorm != every[last-1].GradNorm || got.TrainedTokens != every[last-1].TrainedTokens {
			t.Errorf("event %d: %+v; expected step %d and loss %g, the rest of %+v", i, got, last, mean, every[last-1])
		}
	}
}

// Checkpoints are adapters like the final one; save_total_limit keeps the newest and the best one.
func TestCheckpoints(t *testing.T) {
	config := tinyJob(t)
	o := &config.Options
	o.NumTrainEpochs, o.SaveTotalLimit, o.LoadBestModelAtEnd, o.LearningRate = ptr(6), ptr(2), ptr(true), ptr(2e-2)
	// Answers that training on others makes ever less likely.
	other := `{"messages":[{"role":"user","content":"?"},{"role":"assistant","content":"` + strings.Repeat("zq x", 10) + `"}]}`
	if err := os.WriteFile(config.ValidationFile, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	events := runJob(t, config, 0)
	evals, checkpoints := eventsOf(events, child.EventEval), eventsOf(events, child.EventCheckpoint)
	if len(evals) != 6 || len(checkpoints) != 6 {
		t.Fatalf("%d evaluations and %d checkpoints, expected 6", len(evals), len(checkpoints))
	}
	best := evals[0]
	for _, e := range evals {
		if want := e.ValidLoss < best.ValidLoss || e.Step == evals[0].Step; e.Best != want {
			t.Errorf("evaluation of step %d: best %t, expected %t", e.Step, e.Best, want)
		}
		if e.ValidLoss < best.ValidLoss {
			best = e
		}
	}
	if best.Step == evals[5].Step {
		t.Fatalf("the last evaluation is the best: the test needs another: %+v", evals)
	}
	removed := map[string]bool{}
	for _, e := range checkpoints {
		want, id, name := config.Checkpoint(e.Step)
		if e.CheckpointDir != want {
			t.Errorf("checkpoint in %s, expected %s", e.CheckpointDir, want)
		}
		for _, dir := range e.Removed {
			removed[dir] = true
		}
		if manifest, err := lora.ReadManifest(want); err == nil && (manifest.ID != id || manifest.Name != name) {
			t.Errorf("checkpoint %q called %q, expected %q and %q", manifest.ID, manifest.Name, id, name)
		}
	}
	left := checkpointsIn(t, config.Dir)
	if len(left) != 2 || len(removed) != 4 {
		t.Errorf("checkpoints %v are left and %v were removed, expected 2 and 4", left, removed)
	}
	bestDir, _, _ := config.Checkpoint(best.Step)
	if digest(t, bestDir, lora.PEFTWeights) != digest(t, config.AdapterDir, lora.PEFTWeights) { // adapter.gguf has its name inside
		t.Errorf("the adapter is not that of the best step, %d", best.Step)
	}
}

func TestEarlyStopping(t *testing.T) {
	config := tinyJob(t)
	o := &config.Options
	o.NumTrainEpochs, o.EarlyStoppingPatience, o.EarlyStoppingThreshold = ptr(50), ptr(2), ptr(100.0) // nothing improves by so much
	events := runJob(t, config, 0)
	done := eventsOf(events, child.EventDone)
	if len(done) != 1 || done[0].Step != 9 { // the first evaluation is the best, two have no patience left
		t.Errorf("done %+v, expected after step 9", done)
	}
	if _, err := lora.ReadManifest(config.AdapterDir); err != nil {
		t.Error(err)
	}
}

// A step of many micro-batches is that of one large batch, up to rounding, for every objective.
func TestAccumulationIsOneLargeBatch(t *testing.T) {
	for name, prepare := range map[string]func(*testing.T) child.TrainerConfig{
		"supervised": tinyJob, "dpo": preferenceJob,
		"choices": func(t *testing.T) child.TrainerConfig {
			c := tinyJob(t)
			c.Options.Choices = []string{"A", "B", "C", "D"}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			var losses [2][]float64
			for i, tokens := range []int{minMicroTokens, 4096} {
				config := prepare(t)
				config.Options.BatchSize, config.Options.MicroBatchTokens, config.Options.LoraDropout = ptr(10), ptr(tokens), ptr(0.0)
				for _, e := range eventsOf(runJob(t, config, 0), child.EventStep) {
					losses[i] = append(losses[i], e.TrainLoss, e.GradNorm)
				}
			}
			for i, a := range losses[0] {
				if b := losses[1][i]; !(math.Abs(a-b) <= 1e-4*math.Abs(b)) {
					t.Errorf("value %d: %g in small micro-batches, %g in one", i, a, b)
				}
			}
		})
	}
}

// An adapter to go on from has before the first step what it had after its last one, and is exported as it was.
func TestStartAdapter(t *testing.T) {
	first := tinyJob(t)
	first.Options.UseRSLoRA, first.Options.TargetModules, first.Options.LayersToTransform = ptr(true), []string{"q_proj", "down_proj"}, []int{1}
	evals := eventsOf(runJob(t, first, 0), child.EventEval)
	want := evals[len(evals)-1].ValidLoss
	for name, remove := range map[string][]string{"ours": nil, "PEFT's": {lora.GGUFFile, lora.ManifestFile}} {
		t.Run(name, func(t *testing.T) {
			from := filepath.Join(t.TempDir(), "adapter")
			if err := os.CopyFS(from, os.DirFS(first.AdapterDir)); err != nil {
				t.Fatal(err)
			}
			for _, file := range remove {
				if err := os.Remove(filepath.Join(from, file)); err != nil {
					t.Fatal(err)
				}
			}
			config := tinyJob(t)
			config.StartAdapter = from
			config.Options.R, config.Options.LearningRate, config.Options.MaxSteps = nil, ptr(1e-30), ptr(1)
			events := runJob(t, config, 0)
			if failed := eventsOf(events, child.EventFailed); len(failed) > 0 {
				t.Fatal(failed[0].Error)
			}
			plan := eventsOf(events, child.EventPlan)[0].Plan
			if plan.R != 4 || !plan.UseRSLoRA || !slices.Equal(plan.TargetModules, first.Options.TargetModules) || !slices.Equal(plan.LayersToTransform, []int{1}) {
				t.Errorf("plan %+v, expected the adapter's", plan)
			}
			if got := eventsOf(events, child.EventEval)[0].ValidLoss; got != want {
				t.Errorf("validation loss %g, at the end of the first job %g", got, want)
			}
			if digest(t, first.AdapterDir, lora.PEFTWeights) != digest(t, config.AdapterDir, lora.PEFTWeights) {
				t.Error("the exported adapter differs")
			}
		})
	}
	config := tinyJob(t)
	config.StartAdapter, config.Options.R = first.AdapterDir, ptr(8)
	failed := eventsOf(runJob(t, config, 0), child.EventFailed)
	if len(failed) != 1 || failed[0].Error.Param != "hone.r" {
		t.Errorf("another rank: %+v", failed)
	}
}

// A preference job that goes on from an adapter is anchored to the model with it, not to the base model: its first loss is log 2.
func TestPreferencesFromAnAdapter(t *testing.T) {
	first := tinyJob(t)
	first.Options.LearningRate = ptr(2e-2)
	runJob(t, first, 0)
	config := preferenceJob(t)
	config.StartAdapter, config.Options.R, config.Options.LoraDropout = first.AdapterDir, nil, ptr(0.0)
	steps := eventsOf(runJob(t, config, 0), child.EventStep)
	if len(steps) == 0 || math.Abs(steps[0].TrainLoss-math.Ln2) > 1e-5 || *steps[0].RewardsChosen != 0 {
		t.Errorf("first step %+v: expected the loss log 2 and no rewards", steps)
	}
	// The cache tells the two references apart: the same pairs from the base model.
	base := preferenceJob(t)
	base.TrainingFile, base.CacheDir, base.Options.LoraDropout = config.TrainingFile, config.Dir, ptr(0.0)
	if steps := eventsOf(runJob(t, base, 0), child.EventStep); math.Abs(steps[0].TrainLoss-math.Ln2) > 1e-5 {
		t.Errorf("first step from the base model: loss %g, expected log 2", steps[0].TrainLoss)
	}
}

func TestDryRun(t *testing.T) {
	config := tinyJob(t)
	config.DryRun = true
	var kinds []string
	for _, e := range runJob(t, config, 0) {
		if e.Type != child.EventProgress {
			kinds = append(kinds, e.Type)
		}
		if e.Type == child.EventPlan && e.Plan.Memory.TotalBytes <= 0 {
			t.Errorf("plan without memory: %+v", e.Plan)
		}
	}
	if want := []string{child.EventDataset, child.EventMemory, child.EventPlan, child.EventDone}; !slices.Equal(kinds, want) {
		t.Errorf("events %v, expected %v", kinds, want)
	}
	if _, err := os.Stat(config.AdapterDir); err == nil {
		t.Error("an adapter was written")
	}
}

// newTrainer is a trainer of the tiny model over random rows, ready to optimize.
func newTrainer(t *testing.T, lengths ...int) (*trainer, []dataset.Example, *bytes.Buffer) {
	t.Helper()
	backend, model := loadModel(t, "testdata/tiny-llama-q4_1.gguf", graph.ExactLayout(), 1)
	adapter, err := model.NewLoRA(graph.LoRAOptions{Rank: 4, Alpha: 8, Modules: graph.AllLinear})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(adapter.Close)
	initialise(adapter, "true", 1)
	events := new(bytes.Buffer)
	tr := &trainer{
		backend: backend, model: model, lora: adapter, moments: newMoments(len(adapter.Parameters)), objective: supervised{},
		plan:     child.TrainPlan{BatchSize: len(lengths), TotalSteps: 100, AdamBeta1: 0.9, AdamBeta2: 0.999, AdamEpsilon: 1e-8, MaxGradNorm: 1},
		reporter: reporter{encoder: json.NewEncoder(events)},
	}
	tr.compute = func(m dataset.Micro) (engine.Result, error) { return model.Gradients(m.Batch, adapter, 1) }
	b := randomBatch(model.Vocabulary, lengths...)
	var examples []dataset.Example
	for i, s := range b.Segments {
		row := rowOf(b.Tokens[s.Start:s.End])
		examples = append(examples, dataset.Example{Row: i, Candidates: row, Tokens: s.End - s.Start})
	}
	if tr.data, err = dataset.New(examples...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.data.Close() })
	return tr, examples, events
}

// When memory runs out, micro-batches are halved, said so, and the step is done with the same examples.
func TestMemoryRunsOut(t *testing.T) {
	schedule := Schedule{Kind: "constant", Peak: 1e-3, Total: 100}
	want, examples, _ := newTrainer(t, 50, 60, 70, 80)
	if err := want.optimize(t.Context(), want.pack(examples, 0, 128), schedule); err != nil {
		t.Fatal(err)
	}
	got, examples, events := newTrainer(t, 50, 60, 70, 80)
	compute := got.compute
	got.compute = func(m dataset.Micro) (engine.Result, error) {
		if len(m.Batch.Tokens) > 150 {
			return engine.Result{}, fmt.Errorf("allocate: %w", ggml.ErrMemory)
		}
		return compute(m)
	}
	if err := got.optimize(t.Context(), got.pack(examples, 0, defaultMicroTokens), schedule); err != nil {
		t.Fatal(err)
	}
	if n := got.plan.Memory.MicroBatchTokens; n != 128 {
		t.Errorf("micro-batches of %d tokens, expected 128", n)
	}
	if n := strings.Count(events.String(), "Memory ran out"); n != 3 {
		t.Errorf("%d warnings, expected 3:\n%s", n, events)
	}
	if !slices.Equal(want.lora.Parameters, got.lora.Parameters) {
		t.Error("the step is another than in micro-batches of this size from the start")
	}

	got.compute = func(dataset.Micro) (engine.Result, error) { return engine.Result{}, ggml.ErrMemory }
	err := got.optimize(t.Context(), got.pack(examples, 0, defaultMicroTokens), schedule)
	var failure *child.Error
	if !errors.As(err, &failure) || failure.Code != child.CodeInsufficientMemory {
		t.Errorf("error %v, expected %s", err, child.CodeInsufficientMemory)
	}
}

// A poisoned adapter gives no step: the weights stay as they are, it is said, and repeated ones fail the job.
func TestPoisonedAdapter(t *testing.T) {
	for _, poison := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		t.Run(fmt.Sprint(poison), func(t *testing.T) { poisoned(t, float32(poison)) })
	}
}

func poisoned(t *testing.T, poison float32) {
	tr, examples, events := newTrainer(t, 20, 30)
	tr.lora.Parameters[tr.lora.Parts[0].A] = poison
	before := slices.Clone(tr.lora.Parameters[1:])
	schedule := Schedule{Kind: "constant", Peak: 1e-3, Total: 100}
	var err error
	for range maxSkipped {
		if err != nil {
			t.Fatal(err)
		}
		err = tr.optimize(t.Context(), tr.pack(examples, 0, defaultMicroTokens), schedule)
	}
	var failure *child.Error
	if !errors.As(err, &failure) || failure.Code != child.CodeDiverged {
		t.Errorf("error %v, expected %s", err, child.CodeDiverged)
	}
	if n := strings.Count(events.String(), "skipped"); n != maxSkipped-1 {
		t.Errorf("%d steps reported as skipped, expected %d", n, maxSkipped-1)
	}
	if !slices.Equal(before, tr.lora.Parameters[1:]) {
		t.Error("the weights have changed")
	}
}

// A gradient that is infinite while the loss is finite gives no step either.
func TestInfiniteGradient(t *testing.T) {
	tr, examples, events := newTrainer(t, 20, 30)
	before := slices.Clone(tr.lora.Parameters)
	compute := tr.compute
	tr.compute = func(m dataset.Micro) (engine.Result, error) {
		result, err := compute(m)
		tr.lora.Gradients[7] = float32(math.Inf(1))
		return result, err
	}
	if err := tr.optimize(t.Context(), tr.pack(examples, 0, defaultMicroTokens), Schedule{Kind: "constant", Peak: 1e-3, Total: 100}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(events.String(), "skipped") || !slices.Equal(before, tr.lora.Parameters) {
		t.Errorf("the step was done: %s", events)
	}
}

func TestGaussianInitialisation(t *testing.T) {
	tr, _, _ := newTrainer(t, 4)
	initialise(tr.lora, "gaussian", 1)
	var sum, squares float64
	n := 0
	for _, p := range tr.lora.Parts {
		for _, v := range tr.lora.Parameters[p.A : p.A+tr.lora.Rank*p.In] {
			sum += float64(v)
			squares += float64(v) * float64(v)
			n++
		}
	}
	if deviation := math.Sqrt(squares / float64(n)); math.Abs(sum/float64(n)) > 0.02 || math.Abs(deviation-0.25) > 0.02 { // 1/r
		t.Errorf("mean %g, standard deviation %g of %d values; expected 0 and 0.25", sum/float64(n), deviation, n)
	}
}

// kaiming_uniform with a = sqrt(5), as PEFT has it: uniform within 1/sqrt(in). B and what pads the rank are 0.
func TestUniformInitialisation(t *testing.T) {
	tr, _, _ := newTrainer(t, 4)
	initialise(tr.lora, "true", 1)
	used := make([]bool, len(tr.lora.Parameters))
	var sum, squares, largest float64
	n := 0
	for _, p := range tr.lora.Parts {
		for i := p.A; i < p.A+tr.lora.Rank*p.In; i++ {
			used[i] = true
			v := float64(tr.lora.Parameters[i]) * math.Sqrt(float64(p.In))
			sum += v
			squares += v * v
			largest = max(largest, math.Abs(v))
			n++
		}
	}
	if mean, variance := sum/float64(n), squares/float64(n); math.Abs(mean) > 0.03 || math.Abs(variance-1.0/3) > 0.02 || largest > 1+1e-6 || largest < 0.99 {
		t.Errorf("of %d values, as parts of the bound: mean %g, variance %g, largest %g; expected 0, 1/3 and 1", n, mean, variance, largest)
	}
	for i, v := range tr.lora.Parameters {
		if !used[i] && v != 0 {
			t.Fatalf("parameter %d of B, or of the padding, is %g", i, v)
		}
	}
}

// Checkpoints by steps come at each of them and at the end, as in transformers' Trainer, and none without.
func TestCheckpointsBySteps(t *testing.T) {
	for strategy, want := range map[string][]int{"steps": {4, 8, 9}, "epoch": {3, 6, 9}, "no": nil} {
		config := tinyJob(t)
		config.Options.SaveStrategy = &strategy
		if strategy == "steps" {
			config.Options.SaveSteps = ptr(4)
		}
		var got []int
		for _, e := range eventsOf(runJob(t, config, 0), child.EventCheckpoint) {
			got = append(got, e.Step)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: checkpoints at %v, expected %v", strategy, got, want)
		}
	}
}

// save_minutes is the longest time between resume states: at 0 there is one after each step, at an hour one after each
// epoch, and one where a checkpoint is.
func TestSaveMinutes(t *testing.T) {
	for _, c := range []struct {
		minutes float64
		every   int // steps between checkpoints
		want    []int
	}{
		{0, 0, []int{1, 2, 3, 4, 5, 6, 7, 8, 9}},
		{60, 0, []int{3, 6, 9}},
		{60, 4, []int{3, 4, 6, 8, 9}},
	} {
		config := tinyJob(t)
		config.ValidationFile, config.Options.SaveMinutes, config.Options.SaveStrategy = "", &c.minutes, ptr("no")
		if c.every > 0 {
			config.Options.SaveStrategy, config.Options.SaveSteps = ptr("steps"), &c.every
		}
		var got []int
		for _, e := range eventsOf(runJob(t, config, 0), child.EventSaved) {
			got = append(got, e.Step)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("save_minutes %g, checkpoints every %d: states of %v, expected %v", c.minutes, c.every, got, c.want)
		}
	}
}
