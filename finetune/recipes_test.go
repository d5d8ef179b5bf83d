package finetune_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
)

const pairRow = `{"prompt":"1+1?","chosen":"2","rejected":"3"}` + "\n"

// told is what the trainer of a job's attempt was told.
func (h *home) told(id string) (config child.TrainerConfig) {
	h.t.Helper()
	data, err := os.ReadFile(filepath.Join(h.dir, "jobs", id, "a1", "config.log"))
	if err == nil {
		err = json.Unmarshal(data, &config)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return config
}

func TestDPOJob(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	beta := 0.2
	file := h.upload(pairRow)
	job := h.awaitEnd(h.createSpec(finetune.Spec{
		Model: "base", TrainingFile: file, ValidationFile: file, MethodType: finetune.DPO, Options: behaviour{Steps: 2}.options(),
		Requested: finetune.Hyperparameters{Beta: &beta},
	}).ID, finetune.Succeeded)
	if job.MethodType != finetune.DPO || *job.Options.Beta != 0.2 || *job.Hyperparameters.Beta != 0.1 || job.Plan.Memory.TotalBytes != 4<<30 {
		t.Errorf("job %+v", job)
	}
	told := h.told(job.ID)
	if told.Method != "dpo" || *told.Options.Beta != 0.2 || *told.Options.Device != "cpu" || told.MemoryBytes != 5<<30 || told.CacheDir != filepath.Join(h.dir, "cache") || told.DryRun {
		t.Errorf("the trainer was told %+v", told)
	}
	if messages := h.messages(job.ID); !slices.Contains(messages, "Step 2/2: training loss=1.0000, validation loss=1.5000, full validation loss=1.5000, validation choice accuracy=0.6250") {
		t.Errorf("events\n%s", strings.Join(messages, "\n"))
	}
	if p := job.Progress; p.ValidAccuracy != nil || *p.ValidChoiceAccuracy != 0.625 {
		t.Errorf("progress %+v", p)
	}
	events, _, err := h.jobs.Events(t.Context(), job.ID, "", 5)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"step":2,"total_steps":2,"train_loss":1,"train_choice_accuracy":0.75,"rewards_chosen":0.5,"rewards_rejected":-0.5,"learning_rate":0.001,"grad_norm":2}`
	if got := string(events[3].Data); got != want {
		t.Errorf("step event\n%s\nwant\n%s", got, want)
	}
	want = `{"step":2,"total_steps":2,"train_loss":1,"valid_loss":1.5,"full_valid_loss":1.5,"valid_choice_accuracy":0.625,"best":true}`
	if got := string(events[2].Data); got != want {
		t.Errorf("evaluation event\n%s\nwant\n%s", got, want)
	}
	_, content, err := h.store.OpenFile(t.Context(), job.ResultFiles[0])
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	csv, err := io.ReadAll(content)
	if diff := cmp.Diff(resultHeader+"1,2,,,,0.75,,0.5,-0.5,0.001,2\n2,1,,1.5,,0.75,0.625,0.5,-0.5,0.001,2\n", string(csv)); diff != "" || err != nil {
		t.Errorf("result file, %v (-want +got)\n%s", err, diff)
	}
}

func (h *home) checkpoints(id string) (names []string) {
	h.t.Helper()
	list, more, err := h.jobs.Checkpoints(h.t.Context(), id, "", 0)
	if err != nil || more {
		h.t.Fatal(more, err)
	}
	for _, c := range list {
		if _, err := h.registry.Lookup(c.Model); err != nil {
			h.t.Error(err)
		}
		names = append(names, c.Model[strings.LastIndexByte(c.Model, ':')+1:])
	}
	return names
}

func TestCheckpoints(t *testing.T) {
	t.Parallel()
	t.Run("kept and given up", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.awaitEnd(h.create(behaviour{Steps: 8, Checkpoints: 2}).ID, finetune.Succeeded)
		if diff := cmp.Diff([]string{"ckpt-step-8", "ckpt-step-6"}, h.checkpoints(job.ID)); diff != "" {
			t.Errorf("checkpoints (-want +got)\n%s", diff)
		}
		page, more, err := h.jobs.Checkpoints(t.Context(), job.ID, "", 1)
		if err != nil || !more || len(page) != 1 || page[0].StepNumber != 8 || page[0].Model != job.FineTunedModel+":ckpt-step-8" || !strings.HasPrefix(page[0].ID, "ftckpt_") {
			t.Fatalf("first page %+v, more %v, %v", page, more, err)
		}
		want := `{"step":8,"total_steps":8,"train_loss":0.25,"train_mean_token_accuracy":0.5,"valid_loss":0.375,"valid_mean_token_accuracy":0.25,` +
			`"full_valid_loss":0.375,"full_valid_mean_token_accuracy":0.25}`
		if got := string(page[0].Metrics); got != want {
			t.Errorf("metrics\n%s\nwant\n%s", got, want)
		}
		page, more, err = h.jobs.Checkpoints(t.Context(), job.ID, page[0].ID, 1)
		if err != nil || more || len(page) != 1 || page[0].StepNumber != 6 {
			t.Errorf("second page %+v, more %v, %v", page, more, err)
		}
		var bad *finetune.InvalidError
		if _, _, err := h.jobs.Checkpoints(t.Context(), job.ID, "ftckpt_x", 1); !errors.As(err, &bad) || bad.Param != "after" {
			t.Errorf("unknown cursor: %v", err)
		}
		// The trainer does not wait: it may have given the first ones up before they were looked at.
		if !slices.Contains(h.messages(job.ID), "Checkpoint created at step 8 with Snapshot ID: "+job.FineTunedModel+":ckpt-step-8") {
			t.Errorf("events\n%s", strings.Join(h.messages(job.ID), "\n"))
		}
		// What the trainer has is gone, what is served stays, and one can be deleted as any tuned model.
		h.awaitGone(job.ID, 1)
		if err := h.registry.Delete(t.Context(), job.FineTunedModel+":ckpt-step-6"); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"ckpt-step-8"}, h.checkpoints(job.ID)); diff != "" {
			t.Errorf("after the deletion (-want +got)\n%s", diff)
		}
	})
	// The trainer wrote a checkpoint and ended before anybody knew of it; its resume state is older.
	t.Run("found after a crash", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.awaitEnd(h.create(behaviour{Steps: 4, Checkpoints: 9, Unreported: true}).ID, finetune.Succeeded)
		if diff := cmp.Diff([]string{"ckpt-step-4", "ckpt-step-2"}, h.checkpoints(job.ID)); diff != "" || job.Attempt != 2 {
			t.Errorf("attempt %d, checkpoints (-want +got)\n%s", job.Attempt, diff)
		}
		created := 0
		for _, m := range h.messages(job.ID) {
			if strings.HasPrefix(m, "Checkpoint created at step 2") {
				created++
			}
		}
		if created != 1 {
			t.Errorf("the checkpoint of step 2 was announced %d times", created)
		}
	})
	// A server that was killed before it gave a checkpoint up does it at the next attempt; one that a user deleted stays so.
	t.Run("given up after a crash", func(t *testing.T) {
		t.Parallel()
		h := openHome(t)
		job := h.create(behaviour{Steps: 100, Checkpoints: 9, Delay: 10 * time.Millisecond})
		h.awaitMessages(job.ID, "Checkpoint created", 3)
		name := h.awaitAdapterName(job.ID)
		if err := h.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(h.dir, "jobs", job.ID, "a1", "checkpoints", "step-2")); err != nil {
			t.Fatal(err)
		}
		h.open()
		h.awaitMessages(job.ID, "Resuming from step", 1)
		if _, err := h.registry.Lookup(name + ":ckpt-step-2"); !errors.Is(err, adapters.ErrNotFound) {
			t.Errorf("the checkpoint whose directory is gone: %v", err)
		}
		if _, err := h.registry.Lookup(name + ":ckpt-step-4"); err != nil {
			t.Error(err)
		}
		if _, err := h.jobs.Cancel(t.Context(), job.ID); err != nil {
			t.Error(err)
		}
		if len(h.checkpoints(job.ID)) == 0 {
			t.Error("a cancelled job lost its checkpoints")
		}
	})
}

// awaitAdapterName returns the name that a job's tuned model will have.
func (h *home) awaitAdapterName(id string) string {
	h.t.Helper()
	row, err := h.store.Job(h.t.Context(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return row.AdapterName
}

func TestGoOnFromAdapter(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	first := h.awaitEnd(h.create(behaviour{Steps: 2}).ID, finetune.Succeeded)
	spec := finetune.Spec{
		Model: first.FineTunedModel, TrainingFile: h.upload(goodRow), Suffix: "more", Options: behaviour{Steps: 1000, Delay: 20 * time.Millisecond}.options(),
	}
	for name, edit := range map[string]func(*child.TrainOptions){
		"hone.r":                   func(o *child.TrainOptions) { o.R = new(8) },
		"hone.lora_alpha":          func(o *child.TrainOptions) { o.LoraAlpha = new(8.0) },
		"hone.target_modules":      func(o *child.TrainOptions) { o.TargetModules = []string{"all-linear"} },
		"hone.use_rslora":          func(o *child.TrainOptions) { o.UseRSLoRA = new(true) },
		"hone.layers_to_transform": func(o *child.TrainOptions) { o.LayersToTransform = []int{1} },
		"hone.init_lora_weights":   func(o *child.TrainOptions) { o.InitLoraWeights = new("gaussian") },
	} {
		bad := spec
		edit(&bad.Options)
		var invalid *finetune.InvalidError
		if _, err := h.jobs.Create(t.Context(), bad); !errors.As(err, &invalid) || invalid.Param != name {
			t.Errorf("%s: %v", name, err)
		}
	}
	spec.Options.R, spec.Options.TargetModules = new(16), []string{"v_proj", "q_proj"} // as the adapter has it
	second := h.createSpec(spec)
	h.await(second.ID, "step 1", func(job *finetune.Job) bool { return job.Progress.Step >= 1 })
	told := h.told(second.ID)
	adapter, err := h.registry.Lookup(first.FineTunedModel)
	if err != nil {
		t.Fatal(err)
	}
	if o := told.Options; told.BaseModel != "base" || told.StartAdapter != adapter.Dir || *o.R != 16 || o.LoraAlpha != nil {
		t.Errorf("the trainer was told %+v", told)
	}
	if second.Model != "base" || second.StartAdapter != first.FineTunedModel || !strings.HasPrefix(h.awaitAdapterName(second.ID), "ft:base:local:more:") {
		t.Errorf("job %+v", second)
	}
	var inUse *store.AdapterInUseError
	if err := h.registry.Delete(t.Context(), first.FineTunedModel); !errors.As(err, &inUse) || inUse.JobID != second.ID {
		t.Errorf("deletion of the adapter: %v", err)
	}
	if _, err := h.jobs.Cancel(t.Context(), second.ID); err != nil {
		t.Fatal(err)
	}
	if err := h.registry.Delete(t.Context(), first.FineTunedModel); err != nil {
		t.Error(err)
	}
}

func TestDryRun(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	spec := finetune.Spec{Model: "base", TrainingFile: h.upload(goodRow), Options: behaviour{Steps: 6}.options()}
	got, err := h.jobs.DryRun(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if got.TrainRows != 4 || got.SharedTokens != 10 || got.TruncatedRows != 2 || got.Plan.TotalSteps != 6 || got.Plan.Memory.FreeBytes != 8<<30 || !slices.Equal(got.Notes, []string{"a note"}) {
		t.Errorf("dry run %+v", got)
	}
	nothingLeft := func() {
		t.Helper()
		dirs, err := filepath.Glob(filepath.Join(h.dir, "jobs", "*"))
		jobs, _, listErr := h.jobs.List(t.Context(), finetune.Query{})
		if err != nil || listErr != nil || len(dirs) != 0 || len(jobs) != 0 {
			t.Errorf("left behind: %v, jobs %v, %v, %v", dirs, jobs, err, listErr)
		}
	}
	nothingLeft()

	var failed *finetune.JobError
	spec.Options = behaviour{Fail: child.CodeInsufficientMemory}.options()
	if _, err := h.jobs.DryRun(t.Context(), spec); !errors.As(err, &failed) || failed.Code != child.CodeInsufficientMemory {
		t.Errorf("a job that does not fit: %v", err)
	}
	spec.Options = behaviour{Silent: true}.options()
	if _, err := h.jobs.DryRun(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "without a plan") {
		t.Errorf("a silent trainer: %v", err)
	}
	spec.TrainingFile = h.upload(pairRow)
	if _, err := h.jobs.DryRun(t.Context(), spec); !errors.As(err, &failed) || failed.Param != "training_file" {
		t.Errorf("a file of another method: %v", err)
	}
	spec.Model = "none"
	var bad *finetune.InvalidError
	if _, err := h.jobs.DryRun(t.Context(), spec); !errors.As(err, &bad) || bad.Param != "model" {
		t.Errorf("an unknown model: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	spec = finetune.Spec{Model: "base", TrainingFile: h.upload(goodRow), Options: behaviour{Steps: 6}.options()}
	if _, err := h.jobs.DryRun(ctx, spec); !errors.Is(err, context.Canceled) {
		t.Errorf("a client that went away: %v", err)
	}
	nothingLeft()
}

// TestUntrainable refuses a job for a model that no trainer takes before anything waits for one.
func TestUntrainable(t *testing.T) {
	t.Parallel()
	asked := ""
	h := openHome(t, func(o *finetune.Options) {
		o.Trainable = func(dir string) error {
			asked = dir
			return errors.New("cannot train this model: output.weight: type q3_K is not trainable")
		}
	})
	spec := finetune.Spec{Model: "base", TrainingFile: h.upload(goodRow)}
	for name, create := range map[string]func() error{
		"create":  func() error { _, err := h.jobs.Create(t.Context(), spec); return err },
		"dry run": func() error { _, err := h.jobs.DryRun(t.Context(), spec); return err },
	} {
		bad := new(finetune.InvalidError)
		if err := create(); !errors.As(err, &bad) || bad.Param != "model" || bad.Code != child.CodeInvalidModel || !strings.Contains(bad.Message, "type q3_K") || asked == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
