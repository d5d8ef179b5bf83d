package train

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/lora"
)

// checkpoint writes a servable adapter of the current step and gives up what save_total_limit has no room for.
func (t *trainer) checkpoint() error {
	began := time.Now()
	defer func() { t.spent.saving += time.Since(began) }()
	dir, id, name := t.config.Checkpoint(t.step)
	if err := t.export(dir, id, name); err != nil {
		return err
	}
	// An earlier attempt that was cut off here may have left the same. Now that there is another one, it is not needed.
	for _, earlier := range t.config.ResumeFrom {
		before := child.TrainerConfig{Dir: earlier}
		old, _, _ := before.Checkpoint(t.step)
		if err := os.RemoveAll(old); err != nil {
			return fmt.Errorf("remove the checkpoint of an earlier attempt: %w", err)
		}
	}
	c := checkpoint{Step: t.step, Dir: dir}
	if t.evaluated == t.step {
		c.Metric = t.metric
	}
	kept, removed := prune(append(t.checkpoints, c), t.plan)
	t.checkpoints = kept
	e := child.TrainerEvent{Type: child.EventCheckpoint, Step: t.step, TotalSteps: t.plan.TotalSteps, CheckpointDir: dir}
	for _, old := range removed {
		if err := os.RemoveAll(old.Dir); err != nil {
			return fmt.Errorf("remove an old checkpoint: %w", err)
		}
		e.Removed = append(e.Removed, old.Dir)
	}
	return t.emit(e)
}

// export writes the adapter as it is into a directory, its manifest last.
func (t *trainer) export(dir, id, name string) error {
	w := lora.Weights{
		Manifest: lora.Manifest{
			ID: id, Name: name, BaseModel: t.config.BaseModel, BaseDigest: t.config.BaseDigest,
			JobID: t.config.JobID, CreatedAt: time.Now().Unix(), Rank: t.plan.R, Alpha: t.plan.LoraAlpha, TargetModules: t.plan.TargetModules,
			ChatTemplateDigest: t.template, QuestionTemplate: or(t.config.Options.QuestionTemplate, ""),
			SystemMessage: t.data.SystemMessage, Choices: t.choices(), MaxLength: t.data.Longest,
		},
		Architecture: t.architecture, UseRSLoRA: t.plan.UseRSLoRA, Dropout: t.plan.LoraDropout,
		Heads: t.model.Heads.Query, KVHeads: t.model.Heads.KeyValue, LayersToTransform: t.plan.LayersToTransform,
	}
	for _, p := range t.lora.Parts {
		a, b := t.lora.Matrices(t.lora.Parameters, p)
		w.Modules = append(w.Modules, lora.Module{Layer: p.Layer, Name: p.Module.String(), In: p.In, Out: p.Out, A: a, B: b})
	}
	return lora.Export(dir, w)
}

// choices are the answers that the adapter's manifest names.
func (t *trainer) choices() []string {
	if len(t.plan.Choices) > 0 {
		return t.plan.Choices
	}
	return t.data.Answers
}

// loadBest takes the weights of the best checkpoint.
func (t *trainer) loadBest() error {
	best := bestCheckpoint(t.checkpoints, t.plan)
	if best < 0 {
		return t.warn("No checkpoint has an evaluation: the adapter is that of the last step")
	}
	c := t.checkpoints[best]
	if c.Step == t.step {
		return nil
	}
	w, err := readAdapter(c.Dir, t.basePath())
	if errors.Is(err, os.ErrNotExist) {
		return t.warn("The best checkpoint, of step %d, was removed: the adapter is that of the last step", c.Step)
	}
	if err != nil {
		return err
	}
	if err := setWeights(t.lora, w); err != nil {
		return err
	}
	return t.info("The adapter is that of step %d, the best evaluation (%s %.4f)", c.Step, t.plan.MetricForBestModel, *c.Metric)
}

func readAdapter(dir, base string) (lora.Weights, error) {
	file, err := gguf.Open(base)
	if err != nil {
		return lora.Weights{}, err
	}
	defer file.Close()
	return lora.Read(dir, file)
}

// setWeights replaces the weights of an adapter, which must have the same modules.
func setWeights(l *graph.LoRA, w lora.Weights) error {
	if len(w.Modules) != len(l.Parts) {
		return fmt.Errorf("the adapter has %d modules, expected %d", len(w.Modules), len(l.Parts))
	}
	for i, p := range l.Parts { // both in the order of layers and then of the computation
		m := w.Modules[i]
		if m.Layer != p.Layer || m.Name != p.Module.String() || len(m.A) != l.Rank*p.In || len(m.B) != l.Rank*p.Out {
			return fmt.Errorf("the adapter has layer %d %s, expected layer %d %s of rank %d", m.Layer, m.Name, p.Layer, p.Module, l.Rank)
		}
		l.SetMatrices(p, m.A, m.B)
	}
	return nil
}
