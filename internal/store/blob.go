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

// staged is a blob that is complete and synced under a temporary name.
type staged struct {
	temp   string
	digest string
	bytes  int64
}

// stage copies r into a temporary file, hashing it on the way. On error nothing is left.
func (s *Store) stage(ctx context.Context, r io.Reader) (_ staged, err error) {
	temp := path.Join(tempDir, NewID("", idLength))
	file, err := s.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return staged{}, fmt.Errorf("create blob: %w", err)
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
		return staged{}, fmt.Errorf("write blob: %w", err)
	}
	if err := file.Sync(); err != nil {
		return staged{}, fmt.Errorf("sync blob: %w", err)
	}
	return staged{temp: temp, digest: hex.EncodeToString(hash.Sum(nil)), bytes: n}, nil
}

// publish gives a staged blob its name. The caller holds s.blobs.
func (s *Store) publish(b staged) error {
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
	// A lost database must not take the blobs with it.
	known, err := s.knownBlobs(ctx)
	if err != nil || len(known) == 0 {
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
		s.logger.Info("removed a blob without a file", "sha256", entry.Name())
		return s.root.Remove(name)
	})
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
