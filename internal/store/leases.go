package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// Claim gives owner the next job to run that is not paused and raises its attempt: a running one that nobody holds before a
// queued one, the oldest first. It returns ErrNotFound if there is none.
//
// A job is held while its lease has not expired. What owner itself holds counts as free: an owner runs one job at a time,
// so one that claims again has lost the job it had. change edits the row as in JobUpdate and returns the events of the claim.
func (s *Store) Claim(ctx context.Context, owner string, ttl time.Duration, change func(job *Job) ([]Event, error)) (Job, error) {
	var job Job
	err := s.write(ctx, func(tx *sql.Tx) error {
		now := s.now()
		var err error
		job, err = scanJob(tx.QueryRowContext(ctx, `SELECT `+jobColumns+` FROM jobs
			WHERE status IN ('running', 'queued') AND paused = '' AND NOT EXISTS (
				SELECT 1 FROM leases WHERE job_id = jobs.id AND owner <> ? AND expires_at > ?)
			ORDER BY status = 'running' DESC, seq LIMIT 1`, owner, now.UnixMilli()))
		if errors.Is(err, sql.ErrNoRows) {
			return ErrNotFound
		}
		if err != nil {
			return err
		}
		job.Attempt++
		events, err := change(&job)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO leases (job_id, owner, attempt, expires_at) VALUES (?, ?, ?, ?)
			ON CONFLICT (job_id) DO UPDATE SET owner = excluded.owner, attempt = excluded.attempt, expires_at = excluded.expires_at`,
			job.ID, owner, job.Attempt, now.Add(ttl).UnixMilli())
		if err != nil {
			return err
		}
		return s.putJob(ctx, tx, &job, events)
	})
	if err != nil {
		return Job{}, fmt.Errorf("claim a job: %w", err)
	}
	return job, nil
}

// Heartbeat makes the lease of owner's attempt at a job last ttl from now. It returns ErrStale if the lease is another's.
func (s *Store) Heartbeat(ctx context.Context, jobID, owner string, attempt int, ttl time.Duration) error {
	err := s.write(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, `UPDATE leases SET expires_at = ? WHERE job_id = ? AND owner = ? AND attempt = ?`,
			s.now().Add(ttl).UnixMilli(), jobID, owner, attempt)
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); err != nil || n == 1 {
			return err
		}
		return ErrStale
	})
	if err != nil {
		return fmt.Errorf("heartbeat of job %q: %w", jobID, err)
	}
	return nil
}

// Release gives a lease back, so that the job can be claimed at once. Releasing one that is not held does nothing.
func (s *Store) Release(ctx context.Context, jobID, owner string, attempt int) error {
	err := s.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM leases WHERE job_id = ? AND owner = ? AND attempt = ?`, jobID, owner, attempt)
		return err
	})
	if err != nil {
		return fmt.Errorf("release job %q: %w", jobID, err)
	}
	return nil
}

// Reclaim frees every lease. Only the holder of the data directory's lock may call it, before it claims anything: then
// every lease is of a process that is gone.
func (s *Store) Reclaim(ctx context.Context) error {
	err := s.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM leases`)
		return err
	})
	if err != nil {
		return fmt.Errorf("reclaim leases: %w", err)
	}
	return nil
}
