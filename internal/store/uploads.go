package store

import (
	"context"
	"crypto/md5" // #nosec G501 -- clients send it as a check against accidents
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Upload is a file that comes in parts.
type Upload struct {
	ID        string // upload_...
	CreatedAt int64  // Unix seconds
	ExpiresAt int64  // Unix seconds
	Status    string // one of the Upload constants
	Filename  string
	Purpose   string
	MimeType  string
	Bytes     int64         // that the file will have
	Lifetime  time.Duration // of the file; 0: for ever
	FileID    string        // of a completed one
}

// States of an upload. All but UploadPending are final.
const (
	UploadPending   = "pending"
	UploadCompleted = "completed"
	UploadCancelled = "cancelled"
	UploadExpired   = "expired"
)

// UploadLifetime is how long an upload may be pending.
const UploadLifetime = time.Hour

// UploadPart is a part of a pending upload.
type UploadPart struct {
	ID        string // part_...
	UploadID  string
	CreatedAt int64 // Unix seconds
	Bytes     int64
	sha256    string
}

// UploadError says why an upload cannot be changed as it was asked for. Param is the field of the request, or "".
type UploadError struct{ Param, Message string }

func (e *UploadError) Error() string { return e.Message }

// CreateUpload begins an upload; of u, ID, times and status are set.
func (s *Store) CreateUpload(ctx context.Context, u Upload) (Upload, error) {
	now := s.now()
	u.ID, u.CreatedAt, u.ExpiresAt, u.Status = NewID("upload_", idLength), now.Unix(), now.Add(UploadLifetime).Unix(), UploadPending
	err := s.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO uploads (`+uploadColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			u.ID, u.CreatedAt, u.ExpiresAt, u.Status, u.Filename, u.Purpose, u.MimeType, u.Bytes, int64(u.Lifetime/time.Second), u.FileID)
		if err != nil {
			return err
		}
		return s.keep(ctx, tx, u.ID)
	})
	if err != nil {
		return Upload{}, fmt.Errorf("create upload of %q: %w", u.Filename, err)
	}
	return u, nil
}

const uploadColumns = `id, created_at, expires_at, status, filename, purpose, mime_type, bytes, lifetime, file_id`

func scanUpload(row interface{ Scan(...any) error }) (Upload, error) {
	var u Upload
	var lifetime int64
	err := row.Scan(&u.ID, &u.CreatedAt, &u.ExpiresAt, &u.Status, &u.Filename, &u.Purpose, &u.MimeType, &u.Bytes, &lifetime, &u.FileID)
	u.Lifetime = time.Duration(lifetime) * time.Second
	return u, err
}

type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// upload returns the row as it stands at this moment: one whose time is over has expired, whether or not Expire came by.
func (s *Store) upload(ctx context.Context, from querier, id string) (Upload, error) {
	u, err := scanUpload(from.QueryRowContext(ctx, `SELECT `+uploadColumns+` FROM uploads WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	if u.Status == UploadPending && s.now().Unix() >= u.ExpiresAt {
		u.Status = UploadExpired
	}
	return u, err
}

// Upload returns the upload with this id, or ErrNotFound.
func (s *Store) Upload(ctx context.Context, id string) (Upload, error) {
	u, err := s.upload(ctx, s.reader, id)
	if err != nil {
		return Upload{}, fmt.Errorf("upload %q: %w", id, err)
	}
	return u, nil
}

// pending is Upload, and an *UploadError if the upload is in a final state.
func (s *Store) pending(ctx context.Context, from querier, id string) (Upload, error) {
	u, err := s.upload(ctx, from, id)
	if err == nil && u.Status != UploadPending {
		err = &UploadError{Message: fmt.Sprintf("the upload %s is %s; only a pending one can be changed", id, u.Status)}
	}
	return u, err
}

// AddPart makes a part of staged content, which is gone if that fails: with ErrNotFound, or an *UploadError if the upload is
// not pending.
func (s *Store) AddPart(ctx context.Context, uploadID string, blob *Staged) (UploadPart, error) {
	part := UploadPart{ID: NewID("part_", idLength), UploadID: uploadID, CreatedAt: s.now().Unix(), Bytes: blob.bytes, sha256: blob.digest}
	s.blobs.Lock()
	defer s.blobs.Unlock()
	_, err := s.pending(ctx, s.reader, uploadID)
	if err == nil {
		err = s.publish(*blob)
	}
	if err == nil {
		err = s.write(ctx, func(tx *sql.Tx) error {
			if _, err := s.pending(ctx, tx, uploadID); err != nil {
				return err
			}
			_, err := tx.ExecContext(ctx, `INSERT INTO upload_parts (`+partColumns+`) VALUES (?, ?, ?, ?, ?)`,
				part.ID, part.UploadID, part.CreatedAt, part.Bytes, part.sha256)
			if err != nil {
				return err
			}
			return s.keep(ctx, tx, part.ID)
		})
	}
	if err != nil {
		return UploadPart{}, errors.Join(fmt.Errorf("part of upload %q: %w", uploadID, err), s.removeTemp(blob.temp))
	}
	return part, nil
}

// Part returns the part with this id of an upload that is pending, or ErrNotFound.
func (s *Store) Part(ctx context.Context, id string) (UploadPart, error) {
	p, err := scanPart(s.reader.QueryRowContext(ctx, `SELECT `+partColumns+` FROM upload_parts WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return UploadPart{}, fmt.Errorf("part %q: %w", id, err)
	}
	return p, nil
}

const partColumns = `id, upload_id, created_at, bytes, sha256`

func scanPart(row interface{ Scan(...any) error }) (UploadPart, error) {
	var p UploadPart
	err := row.Scan(&p.ID, &p.UploadID, &p.CreatedAt, &p.Bytes, &p.sha256)
	return p, err
}

func partsOf(ctx context.Context, from querier, uploadID string) ([]UploadPart, error) {
	rows, err := from.QueryContext(ctx, `SELECT `+partColumns+` FROM upload_parts WHERE upload_id = ? ORDER BY seq`, uploadID)
	if err != nil {
		return nil, err
	}
	return collect(rows, scanPart)
}

// PartBytes is how much all parts of an upload have together, those that were sent twice too.
func (s *Store) PartBytes(ctx context.Context, uploadID string) (sum int64, err error) {
	err = s.reader.QueryRowContext(ctx, `SELECT coalesce(sum(bytes), 0) FROM upload_parts WHERE upload_id = ?`, uploadID).Scan(&sum)
	if err != nil {
		return 0, fmt.Errorf("parts of upload %q: %w", uploadID, err)
	}
	return sum, nil
}

// CompleteUpload joins the parts, in this order, to the upload's file. An *UploadError says what is wrong with them: one that
// the upload does not have, or twice; another length than the upload's; another md5, in hexadecimal digits, if sum is not "".
// ErrPickle refuses what they are together. The upload is pending then as before.
func (s *Store) CompleteUpload(ctx context.Context, id string, partIDs []string, sum string) (Upload, File, error) {
	u, file, err := s.completeUpload(ctx, id, partIDs, sum)
	if err != nil {
		return Upload{}, File{}, fmt.Errorf("complete upload %q: %w", id, err)
	}
	return u, file, nil
}

func (s *Store) completeUpload(ctx context.Context, id string, partIDs []string, sum string) (u Upload, file File, err error) {
	if u, err = s.pending(ctx, s.reader, id); err != nil {
		return u, file, err
	}
	parts, err := s.chosen(ctx, u, partIDs)
	if err != nil {
		return u, file, err
	}
	hash := md5.New() // #nosec G401 -- see the import
	blob, err := s.Stage(ctx, io.TeeReader(NotPickled(&partReader{store: s, parts: parts}), hash))
	if err != nil {
		return u, file, err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); sum != "" && !strings.EqualFold(sum, got) {
		err = &UploadError{Param: "md5", Message: fmt.Sprintf("the parts have the md5 %s together, not %s: check their order, and send again what differs", got, sum)}
		return u, file, errors.Join(err, s.Discard(blob))
	}
	file = s.newFile(blob, NewFile{Filename: u.Filename, Purpose: u.Purpose, Lifetime: u.Lifetime})
	s.blobs.Lock()
	defer s.blobs.Unlock()
	if err = s.publish(*blob); err != nil {
		return u, file, errors.Join(err, s.Discard(blob))
	}
	var digests []string
	err = s.write(ctx, func(tx *sql.Tx) error {
		if u, err = s.pending(ctx, tx, id); err != nil {
			return err
		}
		u.Status, u.FileID = UploadCompleted, file.ID
		if err := insertFile(ctx, tx, file); err != nil {
			return err
		}
		if digests, err = endUpload(ctx, tx, u); err != nil {
			return err
		}
		return s.keep(ctx, tx, u.ID)
	})
	if err != nil {
		return u, file, errors.Join(err, s.dropBlobs(context.WithoutCancel(ctx), file.SHA256))
	}
	return u, file, s.dropBlobs(ctx, digests...)
}

// chosen are the parts of these ids, checked.
func (s *Store) chosen(ctx context.Context, u Upload, ids []string) ([]UploadPart, error) {
	all, err := partsOf(ctx, s.reader, u.ID)
	if err != nil {
		return nil, err
	}
	var parts []UploadPart
	var bytes int64
	for i, id := range ids {
		n := slices.IndexFunc(all, func(p UploadPart) bool { return p.ID == id })
		switch {
		case n < 0:
			return nil, &UploadError{Param: fmt.Sprintf("part_ids[%d]", i), Message: fmt.Sprintf("part_ids[%d]: the upload %s has no part %.60q", i, u.ID, id)}
		case slices.Contains(ids[:i], id):
			return nil, &UploadError{Param: fmt.Sprintf("part_ids[%d]", i), Message: fmt.Sprintf("part_ids[%d]: the part %s stands in the list before", i, id)}
		}
		parts, bytes = append(parts, all[n]), bytes+all[n].Bytes
	}
	if bytes != u.Bytes {
		return nil, &UploadError{Param: "part_ids", Message: fmt.Sprintf("the %d parts have %d bytes together, and the upload was created for %d", len(parts), bytes, u.Bytes)}
	}
	return parts, nil
}

// partReader reads one part after the other.
type partReader struct {
	store *Store
	parts []UploadPart
	open  io.ReadCloser
}

func (r *partReader) Read(p []byte) (n int, err error) {
	for {
		if r.open == nil {
			if len(r.parts) == 0 {
				return 0, io.EOF
			}
			if r.open, err = r.store.OpenBlob(r.parts[0].sha256); err != nil {
				return 0, err
			}
			r.parts = r.parts[1:]
		}
		n, err = r.open.Read(p)
		if err != nil {
			if closing := r.open.Close(); errors.Is(err, io.EOF) {
				err = closing
			}
			r.open = nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// endUpload writes a final state and removes the parts' rows, whose digests it returns for dropBlobs.
func endUpload(ctx context.Context, tx *sql.Tx, u Upload) (digests []string, err error) {
	parts, err := partsOf(ctx, tx, u.ID)
	if err != nil {
		return nil, err
	}
	for _, part := range parts {
		digests = append(digests, part.sha256)
	}
	if _, err := tx.ExecContext(ctx, `UPDATE uploads SET status = ?, file_id = ? WHERE id = ?`, u.Status, u.FileID, u.ID); err != nil {
		return nil, err
	}
	_, err = tx.ExecContext(ctx, `DELETE FROM upload_parts WHERE upload_id = ?`, u.ID)
	return digests, err
}

// CancelUpload gives a pending upload up, with its parts. It returns ErrNotFound, or an *UploadError if it is not pending.
func (s *Store) CancelUpload(ctx context.Context, id string) (u Upload, err error) {
	s.blobs.Lock()
	defer s.blobs.Unlock()
	var digests []string
	err = s.write(ctx, func(tx *sql.Tx) error {
		if u, err = s.pending(ctx, tx, id); err != nil {
			return err
		}
		u.Status = UploadCancelled
		digests, err = endUpload(ctx, tx, u)
		return err
	})
	if err == nil {
		err = s.dropBlobs(ctx, digests...)
	}
	if err != nil {
		return Upload{}, fmt.Errorf("cancel upload %q: %w", id, err)
	}
	return u, nil
}

// expireUploads ends the pending uploads whose time is over.
func (s *Store) expireUploads(ctx context.Context) error {
	rows, err := s.reader.QueryContext(ctx, `SELECT `+uploadColumns+` FROM uploads WHERE status = ? AND expires_at <= ?`, UploadPending, s.now().Unix())
	if err != nil {
		return fmt.Errorf("expired uploads: %w", err)
	}
	late, err := collect(rows, scanUpload)
	if err != nil || len(late) == 0 {
		return err
	}
	s.blobs.Lock()
	defer s.blobs.Unlock()
	for _, u := range late {
		var digests []string
		err := s.write(ctx, func(tx *sql.Tx) error {
			now, err := scanUpload(tx.QueryRowContext(ctx, `SELECT `+uploadColumns+` FROM uploads WHERE id = ?`, u.ID))
			if err != nil || now.Status != UploadPending {
				return err
			}
			now.Status = UploadExpired
			digests, err = endUpload(ctx, tx, now)
			return err
		})
		if err == nil {
			err = s.dropBlobs(ctx, digests...)
		}
		if err != nil {
			return fmt.Errorf("expire upload %q: %w", u.ID, err)
		}
		s.logger.Info("an upload has expired", "upload_id", u.ID)
	}
	return nil
}
