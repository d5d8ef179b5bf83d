package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"
)

// File is an uploaded or produced file. Its content is the blob with digest SHA256.
type File struct {
	ID        string // file-...
	CreatedAt int64  // Unix seconds
	Filename  string
	Purpose   string // fine-tune, fine-tune-results, ...
	Bytes     int64
	SHA256    string // hex
	ExpiresAt int64  // Unix seconds; 0: never
	Damage    string // what is wrong with the content, as far as that was seen; "": nothing
}

// FileInUseError says that a file cannot be deleted because an unfinished job or batch reads it.
type FileInUseError struct{ FileID, JobID, BatchID string }

func (e *FileInUseError) Error() string {
	if e.BatchID != "" {
		return fmt.Sprintf("file %s is used by batch %s; cancel the batch first", e.FileID, e.BatchID)
	}
	return fmt.Sprintf("file %s is used by fine-tuning job %s; cancel the job first", e.FileID, e.JobID)
}

// CreateFile stores what r has until its end and returns its row. Limiting r is the caller's: an error of r is returned
// wrapped, and nothing is stored.
func (s *Store) CreateFile(ctx context.Context, filename, purpose string, r io.Reader) (File, error) {
	blob, err := s.stage(ctx, r)
	if err != nil {
		return File{}, fmt.Errorf("create file %q: %w", filename, err)
	}
	return s.AddFile(ctx, &blob, NewFile{Filename: filename, Purpose: purpose})
}

// NewFile is what AddFile is told of a file.
type NewFile struct {
	Filename string
	Purpose  string
	Lifetime time.Duration // after which Expire deletes the file; 0: never
}

// AddFile makes a file of staged content, which is gone if that fails.
func (s *Store) AddFile(ctx context.Context, blob *Staged, f NewFile) (File, error) {
	file := s.newFile(blob, f)
	s.blobs.Lock()
	defer s.blobs.Unlock()
	err := s.publish(*blob)
	if err == nil {
		err = s.write(ctx, func(tx *sql.Tx) error {
			if err := insertFile(ctx, tx, file); err != nil {
				return err
			}
			return s.keep(ctx, tx, file.ID)
		})
	}
	if err != nil {
		return File{}, errors.Join(fmt.Errorf("create file %q: %w", f.Filename, err), s.removeTemp(blob.temp))
	}
	return file, nil
}

func (s *Store) newFile(blob *Staged, f NewFile) File {
	now := s.now()
	file := File{ID: NewID("file-", idLength), CreatedAt: now.Unix(), Filename: f.Filename, Purpose: f.Purpose, Bytes: blob.bytes, SHA256: blob.digest}
	if f.Lifetime > 0 {
		file.ExpiresAt = now.Add(f.Lifetime).Unix()
	}
	return file
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
		`INSERT INTO files (`+fileColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		f.ID, f.CreatedAt, f.Filename, f.Purpose, f.Bytes, f.SHA256, f.ExpiresAt)
	return err
}

const fileColumns = `id, created_at, filename, purpose, bytes, sha256, expires_at`

func scanFile(row interface{ Scan(...any) error }) (File, error) {
	var f File
	err := row.Scan(&f.ID, &f.CreatedAt, &f.Filename, &f.Purpose, &f.Bytes, &f.SHA256, &f.ExpiresAt)
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
	s.noteDamage(&file)
	return file, nil
}

func (s *Store) noteDamage(file *File) {
	if problem, ok := s.damaged.Load(file.SHA256); ok {
		file.Damage = (&ContentError{FileID: file.ID, Problem: problem.(string)}).Error()
	}
}

// OpenFile returns the file with this id and its content, which the caller closes. Errors are ErrNotFound and *ContentError.
func (s *Store) OpenFile(ctx context.Context, id string) (File, io.ReadSeekCloser, error) {
	file, err := s.File(ctx, id)
	if err != nil {
		return File{}, nil, err
	}
	content, err := s.openContent(file)
	if err != nil {
		return File{}, nil, err
	}
	return file, content, nil
}

// FilePath is the absolute path of the content of a file, for a child process to read. Errors are those of OpenFile.
func (s *Store) FilePath(ctx context.Context, id string) (string, error) {
	file, content, err := s.OpenFile(ctx, id)
	if err != nil {
		return "", err
	}
	if err := content.Close(); err != nil {
		return "", fmt.Errorf("content of file %q: %w", id, err)
	}
	return s.BlobPath(file.SHA256)
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
	for i := range files {
		s.noteDamage(&files[i])
	}
	files, more = cut(files, q.Limit)
	return files, more, nil
}

// DeleteFile removes a file, and its blob if nothing else has the same content. It returns ErrNotFound, and
// *FileInUseError while an unfinished job or batch reads the file.
func (s *Store) DeleteFile(ctx context.Context, id string) error {
	s.blobs.Lock()
	defer s.blobs.Unlock()
	var digest string
	err := s.write(ctx, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT sha256 FROM files WHERE id = ?`, id).Scan(&digest)
		if errors.Is(err, sql.ErrNoRows) {
			return ErrNotFound
		}
		if err != nil {
			return err
		}
		if err := unused(ctx, tx, id); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `DELETE FROM files WHERE id = ?`, id)
		return err
	})
	if err != nil {
		return fmt.Errorf("delete file %q: %w", id, err)
	}
	if err := s.dropBlobs(ctx, digest); err != nil {
		return fmt.Errorf("delete content of file %q: %w", id, err)
	}
	return nil
}

// unused returns a *FileInUseError if an unfinished job or batch reads the file.
func unused(ctx context.Context, tx *sql.Tx, id string) error {
	inUse := &FileInUseError{FileID: id}
	err := tx.QueryRowContext(ctx, `SELECT id FROM jobs WHERE (training_file = ?1 OR validation_file = ?1)
		AND status NOT IN ('succeeded', 'failed', 'cancelled') LIMIT 1`, id).Scan(&inUse.JobID)
	if errors.Is(err, sql.ErrNoRows) {
		err = tx.QueryRowContext(ctx, `SELECT id FROM batches WHERE input_file = ? AND status IN `+unfinishedBatch+` LIMIT 1`, id).Scan(&inUse.BatchID)
	}
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return nil
	case err != nil:
		return err
	}
	return inUse
}

// Expire deletes the files, ends the uploads and forgets the idempotency keys whose time has come. A file that an unfinished job or batch reads stays until
// that has ended.
func (s *Store) Expire(ctx context.Context) error {
	rows, err := s.reader.QueryContext(ctx, `SELECT id FROM files WHERE expires_at > 0 AND expires_at <= ?`, s.now().Unix())
	if err != nil {
		return fmt.Errorf("expired files: %w", err)
	}
	ids, err := collect(rows, scanString)
	if err != nil {
		return fmt.Errorf("expired files: %w", err)
	}
	for _, id := range ids {
		err := s.DeleteFile(ctx, id)
		switch inUse := new(FileInUseError); {
		case err == nil:
			s.logger.Info("deleted an expired file", "file_id", id)
		case errors.As(err, &inUse), errors.Is(err, ErrNotFound):
		default:
			return err
		}
	}
	return errors.Join(s.expireUploads(ctx), s.expireKeys(ctx))
}

func scanString(row interface{ Scan(...any) error }) (text string, err error) {
	err = row.Scan(&text)
	return text, err
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
