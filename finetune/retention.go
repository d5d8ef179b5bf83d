package finetune

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/store"
)

// Retention says how long what jobs leave behind is kept. The zero value keeps all but resume states, which go with the end
// of their job.
type Retention struct {
	ResumeStates time.Duration // of jobs that failed or were cancelled, after their end; 0: none
	Checkpoints  time.Duration // after the end of their job; 0: for good. The tuned model itself always stays
	Events       time.Duration // after the end of their job; 0: for good. The last one always stays
	Files        time.Duration // uploads and results, after they were made, unless an unfinished job needs them; 0: for good
	CacheBytes   int64         // of Options.CacheDir; what was used longest ago goes first. 0: no bound
}

// retainInterval is the time between two looks at what is too old.
const retainInterval = 10 * time.Minute

// retainAll removes what is too old, at once and then from time to time.
func (j *Jobs) retainAll(ctx context.Context) {
	for ctx.Err() == nil {
		if err := j.retain(ctx); err != nil && ctx.Err() == nil {
			j.opts.Logger.Error("remove what is too old", "error", err)
		}
		sleep(ctx, retainInterval)
	}
}

func (j *Jobs) retain(ctx context.Context) error {
	keep, now := j.opts.Retention, j.opts.Now()
	var errs []error
	if keep.ResumeStates > 0 {
		errs = append(errs, j.sweep(ctx))
	}
	if keep.Checkpoints > 0 {
		errs = append(errs, j.retainCheckpoints(ctx, now.Add(-keep.Checkpoints)))
	}
	if keep.Events > 0 {
		_, err := j.opts.Store.RemoveEvents(ctx, now.Add(-keep.Events))
		errs = append(errs, err)
	}
	if keep.Files > 0 {
		errs = append(errs, j.retainFiles(ctx, now.Add(-keep.Files)))
	}
	return errors.Join(append(errs, j.evict())...)
}

// retainCheckpoints deletes the checkpoints of jobs that ended before a time, but for those that another job goes on from.
func (j *Jobs) retainCheckpoints(ctx context.Context, before time.Time) error {
	jobs := map[string]store.Job{}
	for _, a := range j.opts.Adapters.List() {
		row, known := jobs[a.JobID]
		if !known {
			var err error
			if row, err = j.opts.Store.Job(ctx, a.JobID); err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			jobs[a.JobID] = row
		}
		if row.ID == "" || a.ID == row.AdapterID || row.FinishedAt == 0 || row.FinishedAt >= before.Unix() {
			continue
		}
		err := j.opts.Adapters.Delete(ctx, a.Name)
		var inUse *store.AdapterInUseError
		if err != nil && !errors.Is(err, adapters.ErrNotFound) && !errors.As(err, &inUse) {
			return err
		}
	}
	return nil
}

// retainFiles deletes the files that were made before a time and that no unfinished job needs.
func (j *Jobs) retainFiles(ctx context.Context, before time.Time) error {
	for after := ""; ; {
		files, more, err := j.opts.Store.Files(ctx, store.FileQuery{After: after, Ascending: true, Limit: 100})
		if err != nil {
			return err
		}
		after = ""
		for _, file := range files {
			if file.CreatedAt >= before.Unix() {
				return nil
			}
			err := j.opts.Store.DeleteFile(ctx, file.ID)
			var inUse *store.FileInUseError
			switch {
			case errors.As(err, &inUse):
				after = file.ID // those before are gone
			case err != nil && !errors.Is(err, store.ErrNotFound):
				return err
			}
		}
		if !more {
			return nil
		}
	}
}

// evict removes the files of the cache that were used longest ago until the rest is within its bound. A trainer that has one
// open keeps it.
func (j *Jobs) evict() error {
	bound := j.opts.Retention.CacheBytes
	if bound <= 0 || j.opts.CacheDir == "" {
		return nil
	}
	entries, err := os.ReadDir(j.opts.CacheDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var files []fs.FileInfo
	total := int64(0)
	for _, entry := range entries {
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return err
		}
		files, total = append(files, info), total+info.Size()
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, file := range files {
		if total <= bound {
			break
		}
		if err := os.Remove(filepath.Join(j.opts.CacheDir, file.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		total -= file.Size()
	}
	return nil
}
