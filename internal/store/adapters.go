package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// Adapter is the row of a servable adapter.
type Adapter struct {
	ID         string // its directory
	Name       string // ft:...
	JobID      string
	BaseModel  string
	BaseDigest string
	CreatedAt  int64 // Unix seconds
	Deleted    bool  // hidden; its files are still to be removed
}

// PutAdapter adds an adapter, or replaces the row with the same id.
func (s *Store) PutAdapter(ctx context.Context, a Adapter) error {
	err := s.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO adapters (id, name, job_id, base_model, base_digest, created_at, deleted)
			VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET name = excluded.name, job_id = excluded.job_id,
			base_model = excluded.base_model, base_digest = excluded.base_digest, created_at = excluded.created_at, deleted = excluded.deleted`,
			a.ID, a.Name, a.JobID, a.BaseModel, a.BaseDigest, a.CreatedAt, a.Deleted)
		return err
	})
	if err != nil {
		return fmt.Errorf("put adapter %q: %w", a.ID, err)
	}
	return nil
}

// Adapters returns all adapters, deleted ones too, oldest first.
func (s *Store) Adapters(ctx context.Context) ([]Adapter, error) { return adapterRows(ctx, s.reader) }

func adapterRows(ctx context.Context, db *sql.DB) ([]Adapter, error) {
	rows, err := db.QueryContext(ctx,
		`SELECT id, name, job_id, base_model, base_digest, created_at, deleted FROM adapters ORDER BY seq`)
	if err != nil {
		return nil, fmt.Errorf("list adapters: %w", err)
	}
	list, err := collect(rows, func(row interface{ Scan(...any) error }) (Adapter, error) {
		var a Adapter
		err := row.Scan(&a.ID, &a.Name, &a.JobID, &a.BaseModel, &a.BaseDigest, &a.CreatedAt, &a.Deleted)
		return a, err
	})
	if err != nil {
		return nil, fmt.Errorf("list adapters: %w", err)
	}
	return list, nil
}

// AdapterInUseError says that an adapter cannot be deleted because an unfinished job goes on from it.
type AdapterInUseError struct{ Adapter, JobID string }

func (e *AdapterInUseError) Error() string {
	return fmt.Sprintf("fine-tuning job %s goes on from %s; cancel the job first", e.JobID, e.Adapter)
}

// HideAdapter marks an adapter as deleted: after it, no restart brings the adapter back. It returns ErrNotFound, and
// *AdapterInUseError while an unfinished job goes on from the adapter.
func (s *Store) HideAdapter(ctx context.Context, id string) error {
	return s.onAdapter(ctx, id, `UPDATE adapters SET deleted = 1 WHERE id = ?`)
}

// RemoveAdapter removes the row, once the files are gone. It returns ErrNotFound.
func (s *Store) RemoveAdapter(ctx context.Context, id string) error {
	return s.onAdapter(ctx, id, `DELETE FROM adapters WHERE id = ?`)
}

func (s *Store) onAdapter(ctx context.Context, id, statement string) error {
	err := s.write(ctx, func(tx *sql.Tx) error {
		var inUse AdapterInUseError
		err := tx.QueryRowContext(ctx, `SELECT adapters.name, jobs.id FROM adapters JOIN jobs ON jobs.start_adapter = adapters.name
			WHERE adapters.id = ? AND jobs.status NOT IN ('succeeded', 'failed', 'cancelled') LIMIT 1`, id).Scan(&inUse.Adapter, &inUse.JobID)
		if err == nil {
			return &inUse
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		result, err := tx.ExecContext(ctx, statement, id)
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); err != nil || n == 1 {
			return err
		}
		return ErrNotFound
	})
	if err != nil {
		return fmt.Errorf("adapter %q: %w", id, err)
	}
	return nil
}
