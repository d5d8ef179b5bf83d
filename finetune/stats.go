package finetune

import (
	"context"
	"fmt"
	"maps"
	"slices"
)

// Stats are numbers about all jobs that there are.
type Stats struct {
	Jobs          map[Status]int // of every status, also 0
	Steps         int64          // optimizer steps done, those that were repeated after a resume once
	TrainedTokens int64
	Running       []Job          // whose trainer runs now
	Processes     map[string]int // of these trainers, by job id
}

// Stats counts the jobs.
func (j *Jobs) Stats(ctx context.Context) (Stats, error) {
	totals, err := j.opts.Store.JobTotals(ctx)
	if err != nil {
		return Stats{}, fmt.Errorf("count jobs: %w", err)
	}
	stats := Stats{Jobs: map[Status]int{}, Steps: totals.Steps, TrainedTokens: totals.TrainedTokens}
	for _, status := range []Status{ValidatingFiles, Queued, Running, Succeeded, Failed, Cancelled} {
		stats.Jobs[status] = totals.ByStatus[string(status)]
	}
	stats.Processes = map[string]int{}
	j.mu.Lock()
	live := slices.Sorted(maps.Keys(j.live))
	for id, working := range j.live {
		working.mu.Lock()
		if working.pid != 0 {
			stats.Processes[id] = working.pid
		}
		working.mu.Unlock()
	}
	j.mu.Unlock()
	for _, id := range live {
		job, err := j.Get(ctx, id)
		switch {
		case err != nil:
			return stats, err
		case job.Status == Running:
			stats.Running = append(stats.Running, *job)
		}
	}
	return stats, nil
}

// process notes the process id of the trainer; 0: it has ended.
func (r *run) process(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pid = pid
}
