package finetune

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

// Checkpoints returns a page of a job's servable checkpoints, newest first, and whether there are more. Which there are is
// for the registry of adapters to say: one that was deleted is not listed. After and limit are as in Query; the default
// limit is 10.
func (j *Jobs) Checkpoints(ctx context.Context, id, after string, limit int) ([]Checkpoint, bool, error) {
	row, err := j.opts.Store.Job(ctx, id)
	if err != nil {
		return nil, false, notFound(id, err)
	}
	if limit <= 0 {
		limit = 10
	}
	list := []Checkpoint{}
	found := after == ""
	published := j.checkpoints(row)
	for i, c := range published {
		checkpoint := Checkpoint{ID: "ftckpt_" + c.ID, CreatedAt: c.CreatedAt, Model: c.Name, StepNumber: c.step, JobID: id}
		if !found {
			found = checkpoint.ID == after
			continue
		}
		if checkpoint.Metrics, err = j.metricsAt(ctx, id, c.step); err != nil {
			return nil, false, err
		}
		if list = append(list, checkpoint); len(list) == min(limit, 1000) {
			return list, i+1 < len(published), nil
		}
	}
	if !found {
		return nil, false, invalid("after", "", "after %q is not an id of this list", after)
	}
	return list, false, nil
}

// published is a checkpoint in the registry.
type published struct {
	adapters.Adapter
	step int
}

// checkpoints returns the published checkpoints of a job, the newest first.
func (j *Jobs) checkpoints(row store.Job) (list []published) {
	for _, a := range j.opts.Adapters.List() {
		digits, ok := strings.CutPrefix(a.ID, row.AdapterID+"-step-")
		if step, err := strconv.Atoi(digits); ok && err == nil && a.JobID == row.ID {
			list = append(list, published{a, step})
		}
	}
	slices.SortFunc(list, func(a, b published) int { return b.step - a.step })
	return list
}

// metricsAt joins what the events of a step measured.
func (j *Jobs) metricsAt(ctx context.Context, id string, step int) (json.RawMessage, error) {
	events, err := j.opts.Store.MetricsAt(ctx, id, step)
	if err != nil {
		return nil, err
	}
	all := metrics{Step: step}
	for _, e := range events {
		var m metrics
		if err := json.Unmarshal(e.Data, &m); err != nil {
			return nil, fmt.Errorf("event %s: %w", e.ID, err)
		}
		all = m.join(all)
	}
	return json.Marshal(all)
}

// checkpoint takes up the checkpoint that an event names, and gives up those that the trainer has removed.
func (j *Jobs) checkpoint(ctx context.Context, row *store.Job, e child.TrainerEvent) error {
	if e.CheckpointDir != "" && e.Step > row.CheckpointStep {
		if err := j.takeUp(ctx, row, e.CheckpointDir, e.Step); err != nil {
			return err
		}
	}
	for _, dir := range e.Removed {
		if err := j.giveUp(ctx, *row, filepath.Base(dir)); err != nil {
			return err
		}
	}
	return nil
}

// takeUp publishes the checkpoint in dir and writes that down. Done twice, it changes nothing the second time. One that the
// trainer, which does not wait for us, has given up meanwhile is passed over.
func (j *Jobs) takeUp(ctx context.Context, row *store.Job, dir string, step int) error {
	config := child.TrainerConfig{AdapterID: row.AdapterID, AdapterName: row.AdapterName}
	_, id, name := config.Checkpoint(step)
	m, err := lora.ReadManifest(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if m.ID != id || m.Name != name || m.BaseDigest != row.BaseDigest || m.JobID != row.ID {
		return fmt.Errorf("the trainer wrote checkpoint %q of base %.12s; expected %q of base %.12s", m.Name, m.BaseDigest, name, row.BaseDigest)
	}
	if _, err := j.opts.Adapters.Import(ctx, dir); errors.Is(err, fs.ErrNotExist) {
		return nil // removed while it was looked at
	} else if err != nil {
		return err
	}
	next, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{ID: row.ID, Attempt: row.Attempt, Change: func(row *store.Job) error {
		row.CheckpointStep = step
		return nil
	}, Events: []store.Event{message("info", "Checkpoint created at step %d with Snapshot ID: %s", step, name)}})
	if err != nil {
		return err
	}
	*row = next
	return nil
}

// giveUp unpublishes the checkpoint whose directory is called base: step-N. One that another job goes on from stays.
func (j *Jobs) giveUp(ctx context.Context, row store.Job, base string) error {
	step, err := strconv.Atoi(strings.TrimPrefix(base, "step-"))
	if err != nil {
		return fmt.Errorf("the trainer removed %q, which is no checkpoint", base)
	}
	config := child.TrainerConfig{AdapterID: row.AdapterID, AdapterName: row.AdapterName}
	_, _, name := config.Checkpoint(step)
	err = j.opts.Adapters.Delete(ctx, name)
	var inUse *store.AdapterInUseError
	if errors.Is(err, adapters.ErrNotFound) || errors.As(err, &inUse) {
		return nil
	}
	return err
}

// reconcile makes the published checkpoints those that earlier attempts have on disk, after a server that ended between the
// trainer's work and its own: a directory with a manifest is a checkpoint, whether or not its event was read. One that
// was taken up and then deleted by a user stays deleted.
func (j *Jobs) reconcile(ctx context.Context, row *store.Job, config child.TrainerConfig) error {
	if len(config.ResumeFrom) == 0 {
		return nil
	}
	dirs := map[int]string{}
	for _, attempt := range slices.Backward(config.ResumeFrom) { // oldest first: the newest wins
		found, err := filepath.Glob(filepath.Join(attempt, "checkpoints", "step-*", lora.ManifestFile))
		if err != nil {
			return err
		}
		for _, manifest := range found {
			dir := filepath.Dir(manifest)
			if step, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), "step-")); err == nil {
				dirs[step] = dir
			}
		}
	}
	for _, c := range j.checkpoints(*row) {
		if dirs[c.step] == "" {
			if err := j.giveUp(ctx, *row, fmt.Sprintf("step-%d", c.step)); err != nil {
				return err
			}
		}
	}
	steps := make([]int, 0, len(dirs))
	for step := range dirs {
		steps = append(steps, step)
	}
	slices.Sort(steps)
	for _, step := range steps {
		if step <= row.CheckpointStep {
			continue
		}
		if err := j.takeUp(ctx, row, dirs[step], step); err != nil {
			return err
		}
	}
	return nil
}
