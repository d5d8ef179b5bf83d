package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/hone-llm/hone/internal/durable"
)

const (
	blobDir = "blobs/sha256" // blobs/sha256/ab/abcd...: named by content
	tempDir = "blobs/tmp"    // in the same file system as blobDir, so that a rename is atomic
)

// blobPath is where the blob with this digest lies, relative to the data directory.
// It is the only place that turns a digest into a path.
func blobPath(digest string) (string, error) {
	if len(digest) != 2*sha256.Size || strings.Trim(digest, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is not a sha256 digest", digest)
	}
	return path.Join(blobDir, digest[:2], digest), nil
}

// Staged is content that is complete and synced under a temporary name, and belongs to no file yet.
type Staged struct {
	temp   string
	digest string
	bytes  int64
}

// Digest is the sha256 of the content, hex.
func (b *Staged) Digest() string { return b.digest }

// Bytes is the length of the content.
func (b *Staged) Bytes() int64 { return b.bytes }

// Stage copies what r has until its end into a temporary file, hashing it on the way. AddFile and AddPart give it its name;
// the caller calls Discard if it comes to neither. An error of r is returned wrapped, and nothing is left.
func (s *Store) Stage(ctx context.Context, r io.Reader) (*Staged, error) {
	blob, err := s.stage(ctx, r)
	if err != nil {
		return nil, err
	}
	return &blob, nil
}

// Discard removes what was staged, unless it has become a blob meanwhile.
func (s *Store) Discard(b *Staged) error { return s.removeTemp(b.temp) }

// reservedBytes is what uploads leave free for the database and for jobs.
const reservedBytes = 64 << 20

// SpaceError says that the data directory's file system has no room for content.
type SpaceError struct {
	Dir        string
	Need, Free int64 // bytes; Free without the reserve
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("%d bytes are needed in %s and %d are free: free some space, or delete files, jobs or models that are not needed", e.Need, e.Dir, e.Free)
}

// CheckSpace returns a *SpaceError if so many bytes more would not fit into the data directory.
func (s *Store) CheckSpace(bytes int64) error {
	free, err := durable.FreeBytes(s.dir)
	if err != nil {
		return fmt.Errorf("free space of %s: %w", s.dir, err)
	}
	if free = max(free-reservedBytes, 0); bytes > free {
		return &SpaceError{Dir: s.dir, Need: bytes, Free: free}
	}
	return nil
}

// stage copies r into a temporary file, hashing it on the way. On error nothing is left.
func (s *Store) stage(ctx context.Context, r io.Reader) (_ Staged, err error) {
	temp := path.Join(tempDir, NewID("", idLength))
	file, err := s.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Staged{}, fmt.Errorf("create blob: %w", err)
	}
	defer func() {
		err = errors.Join(err, file.Close())
		if err != nil {
			err = errors.Join(err, s.root.Remove(temp))
		}
	}()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(file, hash), &contextReader{ctx: ctx, r: r})
	if err != nil {
		return Staged{}, fmt.Errorf("write blob: %w", err)
	}
	if err := file.Sync(); err != nil {
		return Staged{}, fmt.Errorf("sync blob: %w", err)
	}
	return Staged{temp: temp, digest: hex.EncodeToString(hash.Sum(nil)), bytes: n}, nil
}

// publish gives a staged blob its name. The caller holds s.blobs.
func (s *Store) publish(b Staged) error {
	name, err := blobPath(b.digest)
	if err != nil {
		return err
	}
	dir := path.Dir(name)
	_, err = s.root.Stat(dir)
	fresh := errors.Is(err, fs.ErrNotExist)
	if err := s.root.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("publish blob: %w", err)
	}
	// Renaming onto a blob of the same name replaces it with the same bytes, and mends one that was damaged.
	if err := s.root.Rename(b.temp, name); err != nil {
		return fmt.Errorf("publish blob: %w", err)
	}
	s.damaged.Delete(b.digest)
	if err := s.syncDir(dir); err != nil {
		return err
	}
	if fresh {
		return errors.Join(s.syncDir(blobDir), s.syncDir(path.Dir(blobDir)), s.syncDir("."))
	}
	return nil
}

func (s *Store) syncDir(dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// OpenBlob opens the blob with this sha256 digest for reading. The caller closes it.
// A blob that is removed meanwhile can be read to its end.
func (s *Store) OpenBlob(digest string) (*os.File, error) {
	name, err := blobPath(digest)
	if err != nil {
		return nil, err
	}
	file, err := s.root.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	return file, nil
}

// BlobPath is the absolute path of the blob with this sha256 digest, for a child process to read.
func (s *Store) BlobPath(digest string) (string, error) {
	name, err := blobPath(digest)
	if err != nil {
		return "", err
	}
	return filepath.Join(s.dir, filepath.FromSlash(name)), nil
}

// sweep removes what a killed server left: temporary files, and blobs that got no row.
func (s *Store) sweep(ctx context.Context) error {
	temps, err := fs.ReadDir(s.root.FS(), tempDir)
	if err != nil {
		return err
	}
	for _, temp := range temps {
		if err := s.root.RemoveAll(path.Join(tempDir, temp.Name())); err != nil {
			return err
		}
		s.logger.Info("removed an unfinished upload", "file", temp.Name())
	}
	known, damaged, err := s.knownBlobs(ctx)
	if err != nil {
		return err
	}
	return fs.WalkDir(s.root.FS(), blobDir, func(name string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && name == blobDir {
			return nil
		}
		if err != nil || entry.IsDir() || known[entry.Name()] {
			return err
		}
		if want, _ := blobPath(entry.Name()); want != name {
			return nil // not ours
		}
		if damaged { // the row that is not as it should be may be this one's
			to, err := lose(s.dir, name, "")
			s.logger.Warn("kept a blob without a file, because there is a file without its blob", "sha256", entry.Name(), "kept", to)
			return err
		}
		s.logger.Info("removed a blob without a file", "sha256", entry.Name())
		return s.root.Remove(name)
	})
}

// knownBlobs are the digests that rows name. It looks for the blob of each, and notes and reports those that are not as they
// should be.
func (s *Store) knownBlobs(ctx context.Context) (known map[string]bool, damaged bool, err error) {
	rows, err := s.reader.QueryContext(ctx, `SELECT id, bytes, sha256 FROM files UNION ALL SELECT id, bytes, sha256 FROM upload_parts`)
	if err != nil {
		return nil, false, err
	}
	files, err := collect(rows, func(row interface{ Scan(...any) error }) (f File, err error) {
		err = row.Scan(&f.ID, &f.Bytes, &f.SHA256)
		return f, err
	})
	known = make(map[string]bool, len(files))
	for _, file := range files {
		known[file.SHA256] = true
		content, err := s.openContent(file)
		if err == nil {
			err = content.Close()
		}
		if err != nil {
			damaged = true
			s.logger.Error("a file cannot be used", "file_id", file.ID, "sha256", file.SHA256, "error", err)
		}
	}
	return known, damaged, err
}

// ContentError says that the content of a file is not as it was stored.
type ContentError struct {
	FileID  string
	Problem string // missing, or has 3 bytes and not 5
}

func (e *ContentError) Error() string {
	return fmt.Sprintf("the content of file %s %s: somebody or something has changed the data directory; upload the same content again, which mends it, or delete the file", e.FileID, e.Problem)
}

// openContent opens the content of a file. It returns *ContentError if that is missing or has another length, and notes that.
func (s *Store) openContent(file File) (*os.File, error) {
	content, err := s.OpenBlob(file.SHA256)
	damage := &ContentError{FileID: file.ID, Problem: "is missing"}
	if err == nil {
		info, statErr := content.Stat()
		if statErr == nil && info.Size() == file.Bytes {
			s.damaged.Delete(file.SHA256)
			return content, nil
		}
		if err = errors.Join(statErr, content.Close()); err == nil {
			damage.Problem = fmt.Sprintf("has %d bytes and not %d", info.Size(), file.Bytes)
			err = damage
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		err = damage
	}
	if !errors.Is(err, damage) {
		return nil, fmt.Errorf("content of file %q: %w", file.ID, err)
	}
	s.damaged.Store(file.SHA256, damage.Problem)
	return nil, err
}

// keepLost moves blobs, and the log of a database, that an absent database leaves behind into LostDir, before a new one would
// call them garbage.
func (s *Store) keepLost() error {
	if info, err := s.root.Stat(DatabaseFile); err == nil && info.Size() > 0 {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range []string{blobDir, DatabaseFile + "-wal"} {
		if info, err := s.root.Stat(name); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() && info.Size() == 0 {
			continue
		} else if err != nil {
			return err
		}
		if info, err := fs.ReadDir(s.root.FS(), name); err == nil && len(info) == 0 {
			continue
		}
		to, err := lose(s.dir, name, lostBlobs)
		if err != nil {
			return err
		}
		s.logger.Error("the database was lost: what it had is kept", "database", filepath.Join(s.dir, DatabaseFile), "was", name, "kept", to)
	}
	return nil
}

// lostBlobs begins the names in LostDir of what a lost database has left.
const lostBlobs = "of-a-lost-database-"

// dropBlobs removes those of the blobs that no row names. The caller holds s.blobs and has removed rows in a transaction that
// is on disk.
func (s *Store) dropBlobs(ctx context.Context, digests ...string) error {
	for _, digest := range digests {
		var rows int
		err := s.writer.QueryRowContext(ctx, `SELECT (SELECT count(*) FROM files WHERE sha256 = ?1) + (SELECT count(*) FROM upload_parts WHERE sha256 = ?1)`, digest).Scan(&rows)
		if err != nil {
			return err
		}
		if rows > 0 {
			continue
		}
		name, err := blobPath(digest)
		if err == nil {
			err = s.root.Remove(name)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// contextReader ends a copy when its context ends: a reader of a file does not know of it.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
