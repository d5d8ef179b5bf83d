package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Job is a fine-tuning job's row. What its JSON columns hold is for package finetune to say.
type Job struct {
	ID             string
	CreatedAt      int64 // Unix seconds
	FinishedAt     int64 // Unix seconds; 0 until the status is final
	Status         string
	Attempt        int // of the run that owns the row; 0 before the first
	Failures       int // attempts in a row that ended without getting further
	SavedStep      int // of the newest resume state
	Model          string
	BaseDigest     string // sha256 of the base model, hex
	TrainingFile   string
	ValidationFile string // "" if none
	Suffix         string
	Seed           int64
	Method         string
	AdapterID      string
	AdapterName    string
	Requested      json.RawMessage
	Options        json.RawMessage
	Metadata       map[string]string
	Plan           json.RawMessage // nil until decided
	ResultFiles    []string
	FineTunedModel string
	ErrorCode      string
	ErrorMessage   string
	ErrorParam     string
	Step           int // the last step with an event
	TotalSteps     int
	TrainedTokens  int64
	TrainLoss      *float64
	TrainAccuracy  *float64
	ValidStep      int // the last step with an evaluation event
	ValidLoss      *float64
	ValidAccuracy  *float64
	StartAdapter   string // name of the adapter that training goes on from, or ""
	CheckpointStep int    // of the newest checkpoint that was taken up

	ValidChoiceAccuracy *float64

	Paused     string  // why the job waits although it could run; "" if it may run
	DiskBytes  int64   // that have to be free before the next attempt
	RunSeconds float64 // of all attempts
}

// Event is one row of a job's log. UpdateJob and CreateJob fill ID, JobID and CreatedAt.
type Event struct {
	ID        string
	JobID     string
	CreatedAt int64 // Unix seconds
	Level     string
	Type      string
	Message   string
	Data      json.RawMessage // nil or an object
}

// AnyAttempt in JobUpdate is for writes that are nobody's attempt: validation, cancelling.
const AnyAttempt = -1

// JobUpdate is one change of a job's row with the events and files that belong to it: all are written or none.
type JobUpdate struct {
	ID string
	// Attempt is the number that the row must still have, or AnyAttempt.
	Attempt int
	// Change edits the row; an error from it undoes everything and is returned. It may not change the id.
	Change func(job *Job) error
	Events []Event
	// Results are produced files; their ids come first in the row's ResultFiles, so that the first is the newest.
	Results []Result
}

// Result is a file that a job produced.
type Result struct {
	Filename string
	Purpose  string
	Content  []byte
}

const jobColumns = `id, created_at, finished_at, status, attempt, failures, saved_step, model, base_digest,
	training_file, validation_file, suffix, seed, method, adapter_id, adapter_name, requested, options, metadata, plan,
	result_files, fine_tuned_model, error_code, error_message, error_param, step, total_steps, trained_tokens,
	train_loss, train_accuracy, valid_step, valid_loss, valid_accuracy, start_adapter, checkpoint_step, valid_choice_accuracy,
	paused, disk_bytes, run_seconds`

// jobValues are the placeholders of jobColumns.
var jobValues = "?" + strings.Repeat(", ?", strings.Count(jobColumns, ","))

func scanJob(row interface{ Scan(...any) error }) (Job, error) {
	var j Job
	var requested, options, metadata, plan, results string
	err := row.Scan(&j.ID, &j.CreatedAt, &j.FinishedAt, &j.Status, &j.Attempt, &j.Failures, &j.SavedStep, &j.Model, &j.BaseDigest,
		&j.TrainingFile, &j.ValidationFile, &j.Suffix, &j.Seed, &j.Method, &j.AdapterID, &j.AdapterName, &requested, &options, &metadata, &plan,
		&results, &j.FineTunedModel, &j.ErrorCode, &j.ErrorMessage, &j.ErrorParam, &j.Step, &j.TotalSteps, &j.TrainedTokens,
		&j.TrainLoss, &j.TrainAccuracy, &j.ValidStep, &j.ValidLoss, &j.ValidAccuracy, &j.StartAdapter, &j.CheckpointStep, &j.ValidChoiceAccuracy,
		&j.Paused, &j.DiskBytes, &j.RunSeconds)
	if err != nil {
		return Job{}, err
	}
	j.Requested, j.Options = json.RawMessage(requested), json.RawMessage(options)
	if plan != "" {
		j.Plan = json.RawMessage(plan)
	}
	if err := json.Unmarshal([]byte(metadata), &j.Metadata); err != nil {
		return Job{}, fmt.Errorf("job %s: metadata: %w", j.ID, err)
	}
	if err := json.Unmarshal([]byte(results), &j.ResultFiles); err != nil {
		return Job{}, fmt.Errorf("job %s: result_files: %w", j.ID, err)
	}
	return j, nil
}

// values are the columns of jobColumns, in that order.
func (j *Job) values() ([]any, error) {
	if j.Metadata == nil {
		j.Metadata = map[string]string{}
	}
	if j.ResultFiles == nil {
		j.ResultFiles = []string{}
	}
	metadata, err := json.Marshal(j.Metadata)
	if err != nil {
		return nil, err
	}
	results, err := json.Marshal(j.ResultFiles)
	if err != nil {
		return nil, err
	}
	return []any{j.ID, j.CreatedAt, j.FinishedAt, j.Status, j.Attempt, j.Failures, j.SavedStep, j.Model, j.BaseDigest,
		j.TrainingFile, j.ValidationFile, j.Suffix, j.Seed, j.Method, j.AdapterID, j.AdapterName, string(j.Requested), string(j.Options), string(metadata), string(j.Plan),
		string(results), j.FineTunedModel, j.ErrorCode, j.ErrorMessage, j.ErrorParam, j.Step, j.TotalSteps, j.TrainedTokens,
		j.TrainLoss, j.TrainAccuracy, j.ValidStep, j.ValidLoss, j.ValidAccuracy, j.StartAdapter, j.CheckpointStep, j.ValidChoiceAccuracy,
		j.Paused, j.DiskBytes, j.RunSeconds}, nil
}

// CreateJob adds the job with its first events. Its files and the adapter that it starts from must exist, so that they
// cannot be deleted between the caller's look and this write; otherwise it returns ErrNotFound.
func (s *Store) CreateJob(ctx context.Context, job Job, events ...Event) error {
	values, err := job.values()
	if err != nil {
		return fmt.Errorf("create job %s: %w", job.ID, err)
	}
	err = s.write(ctx, func(tx *sql.Tx) error {
		for _, id := range []string{job.TrainingFile, job.ValidationFile} {
			if id == "" {
				continue
			}
			var n int
			if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM files WHERE id = ?`, id).Scan(&n); err != nil {
				return err
			}
			if n == 0 {
				return fmt.Errorf("file %q: %w", id, ErrNotFound)
			}
		}
		if job.StartAdapter != "" {
			var n int
			if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM adapters WHERE name = ? AND deleted = 0`, job.StartAdapter).Scan(&n); err != nil {
				return err
			}
			if n == 0 {
				return fmt.Errorf("adapter %q: %w", job.StartAdapter, ErrNotFound)
			}
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO jobs (`+jobColumns+`) VALUES (`+jobValues+`)`, values...) // #nosec G202 -- constants
		if err != nil {
			return err
		}
		if err := s.insertEvents(ctx, tx, job.ID, events); err != nil {
			return err
		}
		return s.keep(ctx, tx, job.ID)
	})
	if err != nil {
		return fmt.Errorf("create job %s: %w", job.ID, err)
	}
	return nil
}

// Job returns the job with this id, or ErrNotFound.
func (s *Store) Job(ctx context.Context, id string) (Job, error) {
	job, err := scanJob(s.reader.QueryRowContext(ctx, `SELECT `+jobColumns+` FROM jobs WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return Job{}, fmt.Errorf("job %q: %w", id, err)
	}
	return job, nil
}

// JobQuery selects jobs of a listing.
type JobQuery struct {
	After      string            // the id that the page before ended with; "" for the first page
	Limit      int               // at most so many
	Metadata   map[string]string // pairs that a job must have, all of them
	NoMetadata bool              // only jobs without any
}

// Jobs returns a page of jobs, newest first, and whether there are more. It returns ErrNotFound if there is no job q.After.
func (s *Store) Jobs(ctx context.Context, q JobQuery) (jobs []Job, more bool, err error) {
	query, args := `SELECT `+jobColumns+` FROM jobs WHERE true`, []any{}
	if q.After != "" {
		seq, err := s.cursor(ctx, "jobs", q.After)
		if err != nil {
			return nil, false, fmt.Errorf("list jobs: %w", err)
		}
		query, args = query+` AND seq < ?`, append(args, seq)
	}
	if q.NoMetadata {
		query += ` AND metadata = '{}'`
	}
	for key, value := range q.Metadata {
		query += ` AND EXISTS (SELECT 1 FROM json_each(jobs.metadata) WHERE key = ? AND value = ?)`
		args = append(args, key, value)
	}
	rows, err := s.reader.QueryContext(ctx, query+` ORDER BY seq DESC LIMIT ?`, append(args, q.Limit+1)...)
	if err != nil {
		return nil, false, fmt.Errorf("list jobs: %w", err)
	}
	jobs, err = collect(rows, scanJob)
	if err != nil {
		return nil, false, fmt.Errorf("list jobs: %w", err)
	}
	jobs, more = cut(jobs, q.Limit)
	return jobs, more, nil
}

// JobsWithStatus returns all jobs with this status, oldest first.
func (s *Store) JobsWithStatus(ctx context.Context, status string) ([]Job, error) {
	rows, err := s.reader.QueryContext(ctx, `SELECT `+jobColumns+` FROM jobs WHERE status = ? ORDER BY seq`, status)
	if err != nil {
		return nil, fmt.Errorf("list %s jobs: %w", status, err)
	}
	jobs, err := collect(rows, scanJob)
	if err != nil {
		return nil, fmt.Errorf("list %s jobs: %w", status, err)
	}
	return jobs, nil
}

// finalState reports whether no write changes a job with this status any more.
func finalState(status string) bool {
	return status == "succeeded" || status == "failed" || status == "cancelled"
}

// UpdateJob changes a job's row in one transaction, with its events and files, and returns the new row. It returns
// ErrStale, and changes nothing, if the row's state is final or its attempt is another than u.Attempt.
func (s *Store) UpdateJob(ctx context.Context, u JobUpdate) (Job, error) {
	job, err := s.updateJob(ctx, u)
	if err != nil {
		return Job{}, fmt.Errorf("update job %q: %w", u.ID, err)
	}
	return job, nil
}

func (s *Store) updateJob(ctx context.Context, u JobUpdate) (job Job, err error) {
	var files []File
	if len(u.Results) > 0 {
		s.blobs.Lock()
		defer s.blobs.Unlock()
	}
	for _, result := range slices.Backward(u.Results) {
		blob, err := s.stage(ctx, bytes.NewReader(result.Content))
		if err == nil {
			err = s.publish(blob)
		}
		if err != nil {
			return Job{}, errors.Join(fmt.Errorf("result file %q: %w", result.Filename, err), s.removeTemp(blob.temp))
		}
		files = append(files, s.newFile(&blob, NewFile{Filename: result.Filename, Purpose: result.Purpose}))
	}
	err = s.write(ctx, func(tx *sql.Tx) error {
		job, err = scanJob(tx.QueryRowContext(ctx, `SELECT `+jobColumns+` FROM jobs WHERE id = ?`, u.ID))
		if errors.Is(err, sql.ErrNoRows) {
			return ErrNotFound
		}
		if err != nil {
			return err
		}
		if finalState(job.Status) || u.Attempt != AnyAttempt && u.Attempt != job.Attempt {
			return fmt.Errorf("attempt %d on a %s job with attempt %d: %w", u.Attempt, job.Status, job.Attempt, ErrStale)
		}
		if u.Change != nil {
			if err := u.Change(&job); err != nil {
				return err
			}
		}
		for _, file := range files {
			if err := insertFile(ctx, tx, file); err != nil {
				return err
			}
			job.ResultFiles = append([]string{file.ID}, job.ResultFiles...)
		}
		return s.putJob(ctx, tx, &job, u.Events)
	})
	return job, err
}

// putJob writes a changed row and its new events. A job that reached a final state loses its lease.
func (s *Store) putJob(ctx context.Context, tx *sql.Tx, job *Job, events []Event) error {
	values, err := job.values()
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `UPDATE jobs SET (`+jobColumns+`) = (`+jobValues+`) WHERE id = ?`, append(values, job.ID)...) // #nosec G202 -- constants
	if err != nil {
		return err
	}
	if finalState(job.Status) {
		if _, err := tx.ExecContext(ctx, `DELETE FROM leases WHERE job_id = ?`, job.ID); err != nil {
			return err
		}
	}
	return s.insertEvents(ctx, tx, job.ID, events)
}

// insertEvents adds events to a job. The time of one is never before that of the one before it, though the clock may have been
// set back.
func (s *Store) insertEvents(ctx context.Context, tx *sql.Tx, jobID string, events []Event) error {
	for _, e := range events {
		_, err := tx.ExecContext(ctx, `INSERT INTO job_events (id, job_id, created_at, level, type, message, data)
			VALUES (?, ?, max(?, ifnull((SELECT created_at FROM job_events WHERE job_id = ? ORDER BY seq DESC LIMIT 1), 0)), ?, ?, ?, ?)`,
			NewID("ftevent-", idLength), jobID, s.now().Unix(), jobID, e.Level, e.Type, e.Message, string(e.Data))
		if err != nil {
			return err
		}
	}
	return nil
}

const eventColumns = `id, job_id, created_at, level, type, message, data`

func scanEvent(row interface{ Scan(...any) error }) (Event, error) {
	var e Event
	var data string
	err := row.Scan(&e.ID, &e.JobID, &e.CreatedAt, &e.Level, &e.Type, &e.Message, &data)
	if data != "" {
		e.Data = json.RawMessage(data)
	}
	return e, err
}

// Events returns a page of a job's events, newest first, and whether there are more. after is the id that the page before
// ended with, or ""; ErrNotFound if the job has no such event.
func (s *Store) Events(ctx context.Context, jobID, after string, limit int) (events []Event, more bool, err error) {
	query, args := `SELECT `+eventColumns+` FROM job_events WHERE job_id = ?`, []any{jobID}
	if after != "" {
		var seq int64
		err := s.reader.QueryRowContext(ctx, `SELECT seq FROM job_events WHERE id = ? AND job_id = ?`, after, jobID).Scan(&seq)
		if errors.Is(err, sql.ErrNoRows) {
			err = fmt.Errorf("after %q: %w", after, ErrNotFound)
		}
		if err != nil {
			return nil, false, fmt.Errorf("list events of job %q: %w", jobID, err)
		}
		query, args = query+` AND seq < ?`, append(args, seq)
	}
	rows, err := s.reader.QueryContext(ctx, query+` ORDER BY seq DESC LIMIT ?`, append(args, limit+1)...)
	if err != nil {
		return nil, false, fmt.Errorf("list events of job %q: %w", jobID, err)
	}
	events, err = collect(rows, scanEvent)
	if err != nil {
		return nil, false, fmt.Errorf("list events of job %q: %w", jobID, err)
	}
	events, more = cut(events, limit)
	return events, more, nil
}

// MetricsEvents returns all events of type metrics of a job, oldest first: the source of its result file.
func (s *Store) MetricsEvents(ctx context.Context, jobID string) ([]Event, error) {
	rows, err := s.reader.QueryContext(ctx,
		`SELECT `+eventColumns+` FROM job_events WHERE job_id = ? AND type = 'metrics' ORDER BY seq`, jobID)
	if err != nil {
		return nil, fmt.Errorf("metrics of job %q: %w", jobID, err)
	}
	events, err := collect(rows, scanEvent)
	if err != nil {
		return nil, fmt.Errorf("metrics of job %q: %w", jobID, err)
	}
	return events, nil
}

// MetricsAt returns the metrics events of one step of a job, oldest first.
func (s *Store) MetricsAt(ctx context.Context, jobID string, step int) ([]Event, error) {
	rows, err := s.reader.QueryContext(ctx, `SELECT `+eventColumns+` FROM job_events
		WHERE job_id = ? AND type = 'metrics' AND data ->> 'step' = ? ORDER BY seq`, jobID, step)
	if err != nil {
		return nil, fmt.Errorf("metrics of job %q at step %d: %w", jobID, step, err)
	}
	events, err := collect(rows, scanEvent)
	if err != nil {
		return nil, fmt.Errorf("metrics of job %q at step %d: %w", jobID, step, err)
	}
	return events, nil
}

// RemoveEvents removes the events of jobs that reached a final state before the given time, but for the last of each, which
// says how it ended.
func (s *Store) RemoveEvents(ctx context.Context, finishedBefore time.Time) (removed int64, err error) {
	err = s.write(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, `DELETE FROM job_events WHERE job_id IN (SELECT id FROM jobs WHERE finished_at BETWEEN 1 AND ?)
			AND seq NOT IN (SELECT max(seq) FROM job_events GROUP BY job_id)`, finishedBefore.Unix()-1)
		if err != nil {
			return err
		}
		removed, err = result.RowsAffected()
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("remove old events: %w", err)
	}
	return removed, nil
}
