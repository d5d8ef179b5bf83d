package models

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Limits of the files beside the weights.
const (
	maxTokenizerBytes    = 256 << 20
	maxChatTemplateBytes = 1 << 20
)

const tempPrefix = ".tmp-"

// staleAfter is the age from which a temporary directory is no running Add's but a killed one's.
const staleAfter = 24 * time.Hour

// Progress is told how many bytes of total are done. It is called from one goroutine at a time and done never
// decreases; total is 0 while it is unknown.
type Progress func(done, total int64)

// Options of Open. The zero value is usable.
type Options struct {
	Logger *slog.Logger // default: discards
}

// Store is a directory of models. It holds no state in memory: what another process adds or removes is seen at the next
// call. Its methods may be called from any goroutine.
type Store struct {
	dir    string
	logger *slog.Logger
}

// Open returns the store in dir, which is made if it is missing.
func Open(dir string, opts Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open model store: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("open model store: %w", err)
	}
	s := &Store{dir: dir, logger: opts.Logger}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// List returns the models, by name. One that is damaged is left out and logged; Get says what is wrong with it.
func (s *Store) List() ([]Model, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list models: %w", err)
	}
	var out []Model
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || !e.IsDir() {
			continue
		}
		m, err := s.Get(e.Name())
		switch {
		case errors.Is(err, ErrNotFound): // no model, or removed just now
		case err != nil:
			s.logger.Warn("a model is damaged", "model", e.Name(), "error", err)
		default:
			out = append(out, m)
		}
	}
	slices.SortFunc(out, byName)
	return out, nil
}

// Get returns the model of this name as it is on disk now. It returns ErrNotFound, or what is wrong with the model.
func (s *Store) Get(name string) (Model, error) {
	if CheckName(name) != nil {
		return Model{}, fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	m, err := read(filepath.Join(s.dir, name))
	if err != nil {
		return Model{}, notFound(name, err)
	}
	return m, nil
}

// AddOptions say how a file becomes a model.
type AddOptions struct {
	Name         string   // "": NameOf the file
	Source       string   // for the manifest; "": the file's absolute path
	Tokenizer    string   // path of a tokenizer.json; "": the vocabulary in the GGUF file is used
	ChatTemplate string   // path of a Jinja file; "": the template in the GGUF file is used
	Progress     Progress // of reading the weights; may be nil

	link   bool   // the file is never changed in place (it is the cache's): a hard link may stand for a copy
	digest string // expected sha256; "": any
}

// Add validates the GGUF file at path and makes it a model. The file is cloned where the file system can, else copied:
// the digest in the manifest stays true whatever happens to the original. It returns *gguf.FormatError, *NameError or
// ErrExists; after an error or a cancelled ctx nothing of the model is left.
func (s *Store) Add(ctx context.Context, path string, opts AddOptions) (_ Model, err error) {
	name := opts.Name
	if name == "" {
		name = NameOf(path)
	}
	if err := CheckName(name); err != nil {
		return Model{}, err
	}
	dir := filepath.Join(s.dir, name)
	if _, err := os.Lstat(dir); err == nil {
		return Model{}, fmt.Errorf("%w: %q; remove it first with: hone models rm %s", ErrExists, name, name)
	}
	// Before the copy, which may take minutes; the copy itself is validated again below.
	if _, err := describe(path); err != nil {
		return Model{}, fmt.Errorf("add model %q: %w", name, err)
	}
	s.removeStale()
	temp, err := os.MkdirTemp(s.dir, tempPrefix+"*")
	if err != nil {
		return Model{}, fmt.Errorf("add model %q: %w", name, err)
	}
	defer os.RemoveAll(temp) // after the rename there is nothing left to remove

	m, err := s.fill(ctx, temp, path, name, opts)
	if err != nil {
		return Model{}, fmt.Errorf("add model %q: %w", name, err)
	}
	if err := os.Rename(temp, dir); err != nil {
		if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) { // another process was faster
			err = ErrExists
		}
		return Model{}, fmt.Errorf("add model %q: %w", name, err)
	}
	if err := syncDir(s.dir); err != nil {
		return Model{}, fmt.Errorf("add model %q: %w", name, err)
	}
	return Model{Manifest: m, Dir: dir}, nil
}

// fill writes a model's files into temp, the manifest last.
func (s *Store) fill(ctx context.Context, temp, path, name string, opts AddOptions) (Manifest, error) {
	if err := os.Chmod(temp, 0o755); err != nil {
		return Manifest{}, err
	}
	weights := filepath.Join(temp, WeightsFile)
	digest, err := place(ctx, weights, path, opts)
	if err != nil {
		return Manifest{}, err
	}
	if opts.digest != "" && digest != opts.digest {
		return Manifest{}, &DigestError{File: path, Want: opts.digest, Got: digest}
	}
	m, err := describe(weights)
	if err != nil {
		return Manifest{}, err
	}
	if opts.Tokenizer != "" {
		err := copySmall(filepath.Join(temp, TokenizerFile), opts.Tokenizer, maxTokenizerBytes, checkTokenizer)
		if err != nil {
			return Manifest{}, fmt.Errorf("tokenizer: %w", err)
		}
	}
	if opts.ChatTemplate != "" {
		err := copySmall(filepath.Join(temp, ChatTemplateFile), opts.ChatTemplate, maxChatTemplateBytes, checkTemplate)
		if err != nil {
			return Manifest{}, fmt.Errorf("chat template: %w", err)
		}
	}
	m.Name, m.Digest, m.Source, m.CreatedAt = name, digest, opts.Source, time.Now().Unix()
	if m.Source == "" {
		if m.Source, err = filepath.Abs(path); err != nil {
			return Manifest{}, err
		}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return Manifest{}, err
	}
	if err := writeFile(filepath.Join(temp, ManifestFile), append(data, '\n')); err != nil {
		return Manifest{}, err
	}
	return m, syncDir(temp)
}

// Remove deletes the model of this name, also a damaged one. A runner that has it mapped goes on with it; that no job
// needs it is for the caller to check. It returns ErrNotFound.
func (s *Store) Remove(name string) error {
	if CheckName(name) != nil {
		return fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	root, err := os.OpenRoot(s.dir)
	if err != nil {
		return fmt.Errorf("remove model %q: %w", name, err)
	}
	defer root.Close()
	if _, err := root.Lstat(name); err != nil {
		return notFound(name, err)
	}
	// The manifest first: what a kill leaves is no model.
	if err := root.Remove(filepath.Join(name, ManifestFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove model %q: %w", name, err)
	}
	if err := root.RemoveAll(name); err != nil {
		return fmt.Errorf("remove model %q: %w", name, err)
	}
	return syncDir(s.dir)
}

// Pull makes what source names a model: from the cache, or fetched into it. A model that is there already is returned
// as it is. An empty name is source's own.
func (s *Store) Pull(ctx context.Context, cache *Cache, source Source, name string, progress Progress) (Model, error) {
	if name == "" {
		name = source.Name
	}
	if err := CheckName(name); err != nil {
		return Model{}, err
	}
	m, err := s.Get(name)
	if err == nil && source.SHA256 != "" && m.Digest != source.SHA256 {
		return Model{}, fmt.Errorf("%w: %q has sha256 %s, not that of %s; remove it first with: hone models rm %s",
			ErrExists, name, m.Digest, source, name)
	}
	if !errors.Is(err, ErrNotFound) {
		return m, err
	}
	path, digest, err := cache.Fetch(ctx, source, progress)
	if err != nil {
		return Model{}, err
	}
	m, err = s.Add(ctx, path, AddOptions{Name: name, Source: source.String(), link: true, digest: digest})
	if errors.Is(err, ErrExists) { // another process pulled it meanwhile
		m, err = s.Get(name)
	}
	if err == nil && !source.keep() {
		// Removing the model must free the disk.
		if err := os.Remove(path); err != nil {
			s.logger.Warn("cannot remove a file from the cache", "path", path, "error", err)
		}
	}
	return m, err
}

// removeStale removes what killed Adds left.
func (s *Store) removeStale() {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !strings.HasPrefix(e.Name(), tempPrefix) || time.Since(info.ModTime()) < staleAfter {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			s.logger.Warn("cannot remove a temporary directory", "path", e.Name(), "error", err)
		}
	}
}

// place puts the content of src at dst, which must not exist, and returns its sha256.
func place(ctx context.Context, dst, src string, opts AddOptions) (digest string, err error) {
	// A hard link to a symbolic link would be one more of these.
	if src, err = filepath.EvalSymlinks(src); err != nil {
		return "", err
	}
	in, err := os.Open(src)
	if err != nil {
		return "", err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return "", err
	}
	progress := monotone(opts.Progress)
	if opts.link && os.Link(src, dst) == nil {
		return hashOf(ctx, in, io.Discard, info.Size(), progress)
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", err
	}
	defer func() {
		if closeErr := out.Close(); err == nil {
			err = closeErr
		}
	}()
	// A clone shares the blocks (btrfs, XFS); other file systems refuse it.
	var sink io.Writer = out
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		sink = io.Discard
	}
	if digest, err = hashOf(ctx, in, sink, info.Size(), progress); err != nil {
		return "", err
	}
	return digest, out.Sync()
}

// hashOf copies in to out in pieces and returns the sha256 of what was copied.
func hashOf(ctx context.Context, in io.Reader, out io.Writer, total int64, progress Progress) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	done := int64(0)
	for {
		if err := context.Cause(ctx); err != nil {
			return "", err
		}
		n, err := in.Read(buf)
		h.Write(buf[:n])
		if _, writeErr := out.Write(buf[:n]); writeErr != nil {
			return "", writeErr
		}
		done += int64(n)
		progress(done, total)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// copySmall copies a text file of at most limit bytes that check accepts.
func copySmall(dst, src string, limit int64, check func([]byte) error) error {
	info, err := os.Stat(src)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return fmt.Errorf("%s is no regular file of at most %d bytes", src, limit)
	}
	data, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if err := check(data); err != nil {
		return fmt.Errorf("%s: %w", src, err)
	}
	return writeFile(dst, data)
}

func checkTokenizer(data []byte) error {
	var t struct {
		Model json.RawMessage `json:"model"`
	}
	if err := json.Unmarshal(data, &t); err != nil {
		return fmt.Errorf("no tokenizer.json of Hugging Face: %w", err)
	}
	if len(t.Model) == 0 {
		return errors.New(`no tokenizer.json of Hugging Face: it has no "model"`)
	}
	return nil
}

func checkTemplate(data []byte) error {
	if !utf8.Valid(data) || len(strings.TrimSpace(string(data))) == 0 {
		return errors.New("expected a Jinja template in UTF-8, and it is empty or something else")
	}
	return nil
}

// writeFile writes a new file and fsyncs it.
func writeFile(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// monotone returns a Progress that never goes backwards; p may be nil.
func monotone(p Progress) Progress {
	if p == nil {
		return func(int64, int64) {}
	}
	most := int64(-1)
	return func(done, total int64) {
		if done > most {
			most = done
			p(done, total)
		}
	}
}
