package finetune

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
)

// errMoved says that a job is in another state than it was when its caller looked.
var errMoved = errors.New("the job is in another state by now")

// Pause lets a job wait until Resume, also through restarts. A running one saves its state and is queued again; Pause returns
// when its trainer has ended. Pausing a paused job changes nothing. Of a job in a final state it returns *ConflictError. A job
// that ends while it is told to save stays ended.
func (j *Jobs) Pause(ctx context.Context, id string) (*Job, error) {
	for {
		before, err := j.opts.Store.Job(ctx, id)
		if err != nil {
			return nil, notFound(id, err)
		}
		var events []store.Event
		if before.Paused == "" && Status(before.Status) != Running { // else the end of the attempt says where
			events = append(events, message("info", "Fine-tuning job paused: it waits until it is resumed"))
		}
		row, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{ID: id, Attempt: store.AnyAttempt, Events: events, Change: func(row *store.Job) error {
			if row.Status != before.Status {
				return errMoved
			}
			row.Paused = PausedByRequest
			return nil
		}})
		switch {
		case errors.Is(err, errMoved):
			continue
		case errors.Is(err, store.ErrStale):
			return nil, j.conflict(ctx, id, "paused")
		case err != nil:
			return nil, notFound(id, err)
		case Status(row.Status) != Running:
			return j.job(row)
		}
		return j.awaitPause(ctx, id)
	}
}

// awaitPause ends the attempt at a job whose row says that it is paused, and returns the job when nothing of it runs any more.
func (j *Jobs) awaitPause(ctx context.Context, id string) (*Job, error) {
	for {
		j.mu.Lock()
		working, idle := j.live[id], j.stop == nil || j.stopped
		j.mu.Unlock()
		if working != nil {
			working.cancel(ErrPaused)
			select {
			case <-working.ended:
			case <-ctx.Done():
				return nil, fmt.Errorf("pause job %s: its trainer is still saving: %w", id, context.Cause(ctx))
			}
		}
		job, err := j.Get(ctx, id)
		if err != nil || job.Status != Running || job.Paused == "" || idle {
			return job, err
		}
		sleep(ctx, 5*time.Millisecond) // it was claimed, and its attempt has not begun
	}
}

// Resume lets a paused job run again, from where it was, when its turn comes. Resuming a job that is not paused changes
// nothing. Of a job in a final state it returns *ConflictError.
func (j *Jobs) Resume(ctx context.Context, id string) (*Job, error) {
	errNotPaused := errors.New("not paused")
	row, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{
		ID: id, Attempt: store.AnyAttempt, Events: []store.Event{message("info", "Fine-tuning job resumed")},
		Change: func(row *store.Job) error {
			if row.Paused == "" {
				return errNotPaused
			}
			row.Paused = ""
			return nil
		},
	})
	switch {
	case errors.Is(err, errNotPaused):
		return j.Get(ctx, id)
	case errors.Is(err, store.ErrStale):
		return nil, j.conflict(ctx, id, "resumed")
	case err != nil:
		return nil, notFound(id, err)
	}
	wake(j.wakeDispatch)
	return j.job(row)
}

// conflict is why a job in a final state cannot be cancelled, paused or resumed.
func (j *Jobs) conflict(ctx context.Context, id, what string) error {
	job, err := j.Get(ctx, id)
	if err != nil {
		return err
	}
	return &ConflictError{ID: id, Status: job.Status, Message: fmt.Sprintf("job %s is %s and cannot be %s", id, job.Status, what)}
}

// park queues the jobs that were paused while they ran, by a server that was killed before they had.
func (j *Jobs) park(ctx context.Context) error {
	rows, err := j.opts.Store.JobsWithStatus(ctx, string(Running))
	for _, row := range rows {
		if row.Paused == "" {
			continue
		}
		_, err := j.opts.Store.UpdateJob(ctx, store.JobUpdate{
			ID: row.ID, Attempt: row.Attempt, Change: j.move(Queued), Events: []store.Event{pausedAt(row)},
		})
		if err != nil {
			return err
		}
	}
	return err
}

// setAsideIfPaused is for an attempt that ended in another way while its job was paused.
func (j *Jobs) setAsideIfPaused(ctx context.Context, claimed store.Job) {
	row, err := j.opts.Store.Job(context.WithoutCancel(ctx), claimed.ID)
	if err == nil && row.Attempt == claimed.Attempt && Status(row.Status) == Running && row.Paused != "" {
		j.setAside(ctx, claimed, PausedByRequest, nil)
	}
}

func pausedAt(row store.Job) store.Event {
	return message("info", "Fine-tuning job paused at step %d: it waits until it is resumed", row.SavedStep)
}

// setAside queues the job of an attempt that has ended for it to be paused. cause is why, of PausedForSpace.
func (j *Jobs) setAside(ctx context.Context, claimed store.Job, reason string, cause error) {
	last := context.WithoutCancel(ctx)
	row, err := j.opts.Store.Job(last, claimed.ID)
	if err != nil {
		j.writeFailed(ctx, claimed, err)
		return
	}
	event := pausedAt(row)
	if reason == PausedForSpace {
		// What the attempt has begun to export is of no use, and takes room.
		if err := os.RemoveAll(filepath.Join(j.dir(row.ID), fmt.Sprintf("a%d", claimed.Attempt), "adapter")); err != nil {
			j.opts.Logger.Error("remove an unfinished adapter", "job_id", row.ID, "error", err)
		}
		free, err := j.opts.FreeBytes(j.opts.Dir)
		if err != nil {
			j.writeFailed(ctx, claimed, err)
			return
		}
		need := j.needs(row)
		var space *spaceError
		if errors.As(cause, &space) && space.need > 0 {
			need = space.need
		} else if need < free+leastSpace { // it was not enough: wait until there is more
			// But no more than twice as much each time: what is free now may have come since the write failed.
			need = min(free+leastSpace, 2*need+leastSpace)
			row.DiskBytes = need + min(j.stateBytes(row), need) // of which needs will leave need
		}
		event = message("warn", "Fine-tuning job paused: %v. It goes on by itself from step %d when %s are free (now %s), or when it is resumed",
			cause, row.SavedStep, size(need), size(free))
	}
	move, diskBytes := j.move(Queued), row.DiskBytes
	_, err = j.opts.Store.UpdateJob(last, store.JobUpdate{
		ID: claimed.ID, Attempt: claimed.Attempt, Events: []store.Event{event},
		Change: func(row *store.Job) error {
			if reason == PausedForSpace {
				row.DiskBytes = diskBytes
				if row.Paused == "" { // else somebody wants it to wait whatever room there is
					row.Paused = reason
				}
			}
			return move(row)
		},
	})
	if err == nil {
		err = j.queue.Release(last, claimed.ID, j.owner, claimed.Attempt)
	}
	switch {
	case errors.Is(err, store.ErrStale):
		j.lost(last, claimed.ID)
	case err != nil:
		j.writeFailed(ctx, claimed, err)
	}
}

// leastSpace is the free space below which no attempt starts: what its log and the database need.
const leastSpace = 4 << 20

// spaceFor is the free space that a job needs by its plan: two resume states, each of weights and both moments, while
// AdapterBytes has the gradients too.
func spaceFor(m child.MemoryPlan) int64 { return 2 * (m.AdapterBytes / 4 * 3) }

// spaceError says that the disk has no room for a job, which is to wait for it.
type spaceError struct {
	what       string
	need, free int64 // need is 0 if something could not be written, whatever was free
}

func (e *spaceError) Error() string {
	if e.need == 0 {
		return "the disk is full: " + e.what
	}
	return fmt.Sprintf("the disk has %s free, and the job needs %s for two resume states", size(e.free), size(e.need))
}

func size(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

// checkSpace returns *spaceError unless the disk has room for a job.
func (j *Jobs) checkSpace(row store.Job) error {
	free, err := j.opts.FreeBytes(j.opts.Dir)
	if err != nil {
		return fmt.Errorf("free space of %s: %w", j.opts.Dir, err)
	}
	if need := j.needs(row); free < need {
		return &spaceError{need: need, free: free}
	}
	return nil
}

// needs is the free space without which no attempt at a job starts. Resume states that it has count as half of what its plan
// needs: the next attempt removes them when it has written one.
func (j *Jobs) needs(row store.Job) int64 {
	return max(row.DiskBytes-min(j.stateBytes(row), row.DiskBytes/2), leastSpace)
}

// stateBytes is what the resume states of a job take.
func (j *Jobs) stateBytes(row store.Job) (has int64) {
	states, err := filepath.Glob(filepath.Join(j.dir(row.ID), "a*", "state-*", "*"))
	if err != nil {
		j.opts.Logger.Error("look for resume states", "job_id", row.ID, "error", err)
	}
	for _, path := range states {
		if info, err := os.Stat(path); err == nil {
			has += info.Size()
		}
	}
	return has
}

// resumeForSpace lets the oldest job that waits for room on the disk run again if there is room. It reports whether there is one.
func (j *Jobs) resumeForSpace(ctx context.Context) bool {
	rows, err := j.opts.Store.JobsWithStatus(ctx, string(Queued))
	for _, row := range rows {
		if err != nil || row.Paused != PausedForSpace || j.checkSpace(row) != nil {
			continue
		}
		_, err = j.opts.Store.UpdateJob(ctx, store.JobUpdate{
			ID: row.ID, Attempt: row.Attempt, Events: []store.Event{message("info", "Fine-tuning job resumed: there is room on the disk again")},
			Change: func(row *store.Job) error {
				if row.Paused != PausedForSpace {
					return errMoved
				}
				row.Paused = ""
				return nil
			},
		})
		if err == nil {
			return true
		}
	}
	if err != nil && ctx.Err() == nil {
		j.opts.Logger.Error("look for room on the disk", "error", err)
	}
	return false
}
