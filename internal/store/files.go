package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// File is an uploaded or produced file. Its content is the blob with digest SHA256.
type File struct {
	ID        string // file-...
	CreatedAt int64  // Unix seconds
	Filename  string
	Purpose   string // fine-tune, fine-tune-results, ...
	Bytes     int64
	SHA256    string // hex
}

// FileInUseError says that a file cannot be deleted because an unfinished job reads it.
type FileInUseError struct{ FileID, JobID string }

func (e *FileInUseError) Error() string {
	return fmt.Sprintf("file %s is used by fine-tuning job %s; cancel the job first", e.FileID, e.JobID)
}

// CreateFile stores what r has until its end and returns its row. Limiting r is the caller's: an error of r is returned
// wrapped, and nothing is stored.
func (s *Store) CreateFile(ctx context.Context, filename, purpose string, r io.Reader) (File, error) {
	blob, err := s.stage(ctx, r)
	if err != nil {
		return File{}, fmt.Errorf("create file %q: %w", filename, err)
	}
	file := File{
		ID: NewID("file-", idLength), CreatedAt: s.now().Unix(), Filename: filename, Purpose: purpose,
		Bytes: blob.bytes, SHA256: blob.digest,
	}
	s.blobs.Lock()
	defer s.blobs.Unlock()
	if err := s.publish(blob); err != nil {
		return File{}, errors.Join(fmt.Errorf("create file %q: %w", filename, err), s.removeTemp(blob.temp))
	}
	err = s.write(ctx, func(tx *sql.Tx) error { return insertFile(ctx, tx, file) })
	if err != nil {
		return File{}, fmt.Errorf("create file %q: %w", filename, err)
	}
	return file, nil
}

// removeTemp removes a temporary file that may have been renamed already; "" is none.
func (s *Store) removeTemp(temp string) error {
	if temp == "" {
		return nil
	}
	if err := s.root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func insertFile(ctx context.Context, tx *sql.Tx, f File) error {
	_, err := tx.ExecContext(ctx,
		`INSERT INTO files (id, created_at, filename, purpose, bytes, sha256) VALUES (?, ?, ?, ?, ?, ?)`,
		f.ID, f.CreatedAt, f.Filename, f.Purpose, f.Bytes, f.SHA256)
	return err
}

const fileColumns = `id, created_at, filename, purpose, bytes, sha256`

func scanFile(row interface{ Scan(...any) error }) (File, error) {
	var f File
	err := row.Scan(&f.ID, &f.CreatedAt, &f.Filename, &f.Purpose, &f.Bytes, &f.SHA256)
	return f, err
}

// File returns the file with this id, or ErrNotFound.
func (s *Store) File(ctx context.Context, id string) (File, error) {
	file, err := scanFile(s.reader.QueryRowContext(ctx, `SELECT `+fileColumns+` FROM files WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return File{}, fmt.Errorf("file %q: %w", id, ErrNotFound)
	}
	if err != nil {
		return File{}, fmt.Errorf("file %q: %w", id, err)
	}
	return file, nil
}

// OpenFile returns the file with this id and its content, which the caller closes.
func (s *Store) OpenFile(ctx context.Context, id string) (File, io.ReadSeekCloser, error) {
	file, err := s.File(ctx, id)
	if err != nil {
		return File{}, nil, err
	}
	content, err := s.OpenBlob(file.SHA256)
	if err != nil {
		return File{}, nil, fmt.Errorf("content of file %q: %w", id, err)
	}
	return file, content, nil
}

// FileQuery selects files of a listing.
type FileQuery struct {
	After     string // the id that the page before ended with; ErrNotFound if there is none
	Limit     int    // at most so many; 0 means 10000
	Ascending bool   // oldest first; default newest first
	Purpose   string // "" means all
}

// Files returns a page of files and whether there are more after it.
func (s *Store) Files(ctx context.Context, q FileQuery) (files []File, more bool, err error) {
	if q.Limit <= 0 {
		q.Limit = 10000
	}
	query, args := `SELECT `+fileColumns+` FROM files WHERE true`, []any{}
	order, compare := ` ORDER BY seq DESC`, ` AND seq < ?`
	if q.Ascending {
		order, compare = ` ORDER BY seq`, ` AND seq > ?`
	}
	if q.After != "" {
		seq, err := s.cursor(ctx, "files", q.After)
		if err != nil {
			return nil, false, fmt.Errorf("list files: %w", err)
		}
		query, args = query+compare, append(args, seq)
	}
	if q.Purpose != "" {
		query, args = query+` AND purpose = ?`, append(args, q.Purpose)
	}
	rows, err := s.reader.QueryContext(ctx, query+order+` LIMIT ?`, append(args, q.Limit+1)...)
	if err != nil {
		return nil, false, fmt.Errorf("list files: %w", err)
	}
	files, err = collect(rows, scanFile)
	if err != nil {
		return nil, false, fmt.Errorf("list files: %w", err)
	}
	files, more = cut(files, q.Limit)
	return files, more, nil
}

// DeleteFile removes a file, and its blob if no other file has the same content. It returns ErrNotFound, and
// *FileInUseError while an unfinished job reads the file.
func (s *Store) DeleteFile(ctx context.Context, id string) error {
	s.blobs.Lock()
	defer s.blobs.Unlock()
	var digest string
	var others int
	err := s.write(ctx, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT sha256 FROM files WHERE id = ?`, id).Scan(&digest)
		if errors.Is(err, sql.ErrNoRows) {
			return ErrNotFound
		}
		if err != nil {
			return err
		}
		var job string
		err = tx.QueryRowContext(ctx, `SELECT id FROM jobs WHERE (training_file = ? OR validation_file = ?)
			AND status NOT IN ('succeeded', 'failed', 'cancelled') LIMIT 1`, id, id).Scan(&job)
		if err == nil {
			return &FileInUseError{FileID: id, JobID: job}
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM files WHERE id = ?`, id); err != nil {
			return err
		}
		return tx.QueryRowContext(ctx, `SELECT count(*) FROM files WHERE sha256 = ?`, digest).Scan(&others)
	})
	if err != nil {
		return fmt.Errorf("delete file %q: %w", id, err)
	}
	if others > 0 {
		return nil
	}
	name, err := blobPath(digest)
	if err == nil {
		err = s.root.Remove(name)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete content of file %q: %w", id, err)
	}
	return nil
}

func (s *Store) knownBlobs(ctx context.Context) (map[string]bool, error) {
	rows, err := s.reader.QueryContext(ctx, `SELECT DISTINCT sha256 FROM files`)
	if err != nil {
		return nil, err
	}
	digests, err := collect(rows, func(row interface{ Scan(...any) error }) (string, error) {
		var digest string
		err := row.Scan(&digest)
		return digest, err
	})
	known := make(map[string]bool, len(digests))
	for _, digest := range digests {
		known[digest] = true
	}
	return known, err
}

// collect scans all rows and closes them.
func collect[T any](rows *sql.Rows, scan func(interface{ Scan(...any) error }) (T, error)) (list []T, err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		item, err := scan(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, item)
	}
	return list, rows.Err()
}

// cut shortens a list that was read one longer than limit, and reports whether it had to.
func cut[T any](list []T, limit int) ([]T, bool) {
	if len(list) <= limit {
		return list, false
	}
	return list[:limit], true
}
