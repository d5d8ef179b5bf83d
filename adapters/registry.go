package adapters

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/hone-llm/hone/internal/durable"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

// ErrNotFound is returned for a name that no adapter has, or whose adapter was deleted.
var ErrNotFound = errors.New("no such adapter")

// BaseMismatchError says that an adapter was trained on other base weights than those it is to be used with.
type BaseMismatchError struct {
	Adapter   string // name
	BaseModel string
	Want, Got string // sha256 of base.gguf: of the adapter's training, and of the model at hand
}

func (e *BaseMismatchError) Error() string {
	return fmt.Sprintf("adapter %q was trained on %s with sha256 %.12s, and the model of that name here has sha256 %.12s: "+
		"bring the old model back, or train again", e.Adapter, e.BaseModel, e.Want, e.Got)
}

// DamagedError says that the files of an adapter are not as they were published.
type DamagedError struct {
	Adapter string // name
	Problem string
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("adapter %q cannot be served: %s; restore its files and start the server again, or delete the adapter and train again", e.Adapter, e.Problem)
}

// Adapter is a servable adapter.
type Adapter struct {
	lora.Manifest
	Dir string // absolute
}

// GGUF is the path of the weights in the form that the runner loads.
func (a Adapter) GGUF() string { return filepath.Join(a.Dir, lora.GGUFFile) }

// CheckBase returns *BaseMismatchError unless digest is that of the base model that the adapter was trained on.
func (a Adapter) CheckBase(digest string) error {
	if digest == a.BaseDigest {
		return nil
	}
	return &BaseMismatchError{Adapter: a.Name, BaseModel: a.BaseModel, Want: a.BaseDigest, Got: digest}
}

// Options of Open. The zero value is usable.
type Options struct {
	Logger *slog.Logger // default: discards
	// Removed is called with the id of an adapter whose files are gone; it must not wait. nil: nobody wants to know.
	Removed func(id string)
}

// Registry is the set of servable adapters: a directory each, and a row each in the store. Its methods may be called from
// any goroutine.
type Registry struct {
	dir    string
	root   *os.Root
	store  *store.Store
	logger *slog.Logger
	gone   func(id string)

	mu      sync.Mutex
	byName  map[string]*entry
	order   []*entry        // oldest first
	hidden  map[string]bool // ids of deleted adapters whose files are still there
	strange map[string]bool // directories that are no adapters, which was logged
}

type entry struct {
	adapter Adapter
	broken  error // why it cannot be served, found at start
	users   int
	deleted bool // hidden; removed when users is 0
}

// Open reads the adapters below dir, which must be in the file system of the jobs. It finishes deletions that were
// interrupted, and takes up complete directories that have no row (the database was lost, or the server was killed between
// the two steps of Publish). What is damaged is logged and kept: Lookup says why it cannot be served.
// The caller closes the registry.
func Open(ctx context.Context, dir string, st *store.Store, opts Options) (_ *Registry, err error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("adapters: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("adapters: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("adapters: %w", err)
	}
	r := &Registry{dir: dir, root: root, store: st, logger: opts.Logger, gone: opts.Removed, byName: map[string]*entry{}, hidden: map[string]bool{}, strange: map[string]bool{}}
	if err := r.load(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("adapters in %s: %w", dir, err), root.Close())
	}
	return r, nil
}

// Close gives the directory up. Adapters in use stay on disk.
func (r *Registry) Close() error { return r.root.Close() }

func (r *Registry) load(ctx context.Context) error {
	rows, err := r.store.Adapters(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if row.Deleted {
			if err := r.remove(ctx, row.ID); err != nil {
				return err
			}
			r.logger.Info("finished an interrupted deletion", "adapter", row.Name)
			continue
		}
		e := &entry{adapter: Adapter{Dir: filepath.Join(r.dir, row.ID), Manifest: lora.Manifest{
			ID: row.ID, Name: row.Name, JobID: row.JobID, BaseModel: row.BaseModel, BaseDigest: row.BaseDigest, CreatedAt: row.CreatedAt,
		}}}
		if m, err := r.check(row.ID); err != nil {
			e.broken = &DamagedError{Adapter: row.Name, Problem: err.Error()}
			r.logger.Error("adapter cannot be served", "adapter", row.Name, "error", err)
		} else if m.Name != row.Name {
			e.broken = &DamagedError{Adapter: row.Name, Problem: fmt.Sprintf("its manifest names it %q", m.Name)}
			r.logger.Error("adapter cannot be served", "adapter", row.Name, "manifest_name", m.Name)
		} else {
			e.adapter.Manifest = m
		}
		r.add(e)
	}
	dirs, err := fs.ReadDir(r.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if strings.HasPrefix(d.Name(), importPrefix) { // an Import that was interrupted: its source is still there
			if err := r.root.RemoveAll(d.Name()); err != nil {
				return err
			}
		} else if err := r.takeUp(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// takeUp adds the adapter of a directory that has no row: the database was lost, or a server killed, or somebody put a
// complete directory there. The caller holds r.mu, or is Open.
func (r *Registry) takeUp(ctx context.Context, d fs.DirEntry) error {
	known := func(e *entry) bool { return e.adapter.ID == d.Name() }
	if !d.IsDir() || strings.HasPrefix(d.Name(), ".") || r.hidden[d.Name()] || slices.ContainsFunc(r.order, known) {
		return nil
	}
	m, err := r.check(d.Name())
	if err == nil && r.byName[m.Name] != nil {
		err = fmt.Errorf("its name %q is taken", m.Name)
	}
	if err != nil {
		if !r.strange[d.Name()] {
			r.logger.Warn("left a directory alone that is not an adapter", "dir", filepath.Join(r.dir, d.Name()), "error", err)
		}
		r.strange[d.Name()] = true
		return nil
	}
	if err := r.store.PutAdapter(ctx, row(m)); err != nil {
		return err
	}
	r.add(&entry{adapter: Adapter{Manifest: m, Dir: filepath.Join(r.dir, m.ID)}})
	r.logger.Info("took up an adapter without a row", "adapter", m.Name)
	return nil
}

// look takes up what was put into the directory since the last look. What goes wrong is logged: the adapters that are
// known serve on. The caller holds r.mu.
func (r *Registry) look() {
	dirs, err := fs.ReadDir(r.root.FS(), ".")
	for _, d := range dirs {
		if err == nil {
			err = r.takeUp(context.Background(), d)
		}
	}
	if err != nil {
		r.logger.Error("look for new adapters", "dir", r.dir, "error", err)
	}
}

// check reads the manifest of a published adapter and looks that its files are there, but does not hash them: a start
// must not read every adapter.
func (r *Registry) check(id string) (lora.Manifest, error) {
	m, err := lora.ReadManifest(filepath.Join(r.dir, id))
	if err != nil {
		return lora.Manifest{}, err
	}
	if m.ID != id {
		return lora.Manifest{}, fmt.Errorf("manifest has id %q in directory %q", m.ID, id)
	}
	for name := range m.Files {
		if _, err := r.root.Stat(filepath.Join(id, name)); err != nil {
			return lora.Manifest{}, err
		}
	}
	return m, nil
}

// add makes an entry visible. The caller holds r.mu, or is Open.
func (r *Registry) add(e *entry) {
	r.byName[e.adapter.Name] = e
	r.order = append(r.order, e)
}

func row(m lora.Manifest) store.Adapter {
	return store.Adapter{ID: m.ID, Name: m.Name, JobID: m.JobID, BaseModel: m.BaseModel, BaseDigest: m.BaseDigest, CreatedAt: m.CreatedAt}
}

// Publish makes the finished adapter in dir servable: it checks every file's digest against the manifest, moves the
// directory to its place (so dir must be in the same file system) and adds the row. Publishing an adapter that is
// there already is no error: the one that is there stays, and dir is removed. On another error dir stays where it was.
func (r *Registry) Publish(ctx context.Context, dir string) (Adapter, error) {
	m, err := lora.ReadManifest(dir)
	if err != nil {
		return Adapter{}, fmt.Errorf("publish: %w", err)
	}
	for name, want := range m.Files {
		if err := syncAndCheck(filepath.Join(dir, name), want); err != nil {
			return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
		}
	}
	if err := durable.SyncDir(dir); err != nil {
		return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.byName[m.Name]; e != nil && e.broken == nil {
		if e.adapter.ID != m.ID {
			return Adapter{}, fmt.Errorf("publish adapter %q: the name is taken by adapter %s", m.Name, e.adapter.ID)
		}
		if err := os.RemoveAll(dir); err != nil {
			return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
		}
		return e.adapter, nil
	}
	if slices.ContainsFunc(r.order, func(e *entry) bool { return e.adapter.ID == m.ID && e.broken == nil }) {
		return Adapter{}, fmt.Errorf("publish adapter %q: the id %s is taken", m.Name, m.ID)
	}
	place := filepath.Join(r.dir, m.ID)
	// A damaged adapter of this id, which load found, gives way to the new one.
	if err := r.root.RemoveAll(m.ID); err != nil {
		return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
	}
	if err := os.Rename(dir, place); err != nil {
		return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
	}
	if err := errors.Join(durable.SyncDir(r.dir), durable.SyncDir(filepath.Dir(dir))); err != nil {
		return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
	}
	if err := r.store.PutAdapter(ctx, row(m)); err != nil {
		return Adapter{}, fmt.Errorf("publish adapter %q: %w", m.Name, err)
	}
	r.order = slices.DeleteFunc(r.order, func(e *entry) bool { return e.adapter.ID == m.ID })
	e := &entry{adapter: Adapter{Manifest: m, Dir: place}}
	r.add(e)
	r.logger.Info("published adapter", "adapter", m.Name, "base_model", m.BaseModel)
	return e.adapter, nil
}

// importPrefix begins the names of directories that Import fills; no id begins so.
const importPrefix = ".import-"

// Import makes the adapter in dir servable as Publish does, and leaves dir to its owner, who may remove it and may not
// change its files: they are hard links to the same content, or copies where the file system has no links.
func (r *Registry) Import(ctx context.Context, dir string) (_ Adapter, err error) {
	m, err := lora.ReadManifest(dir)
	if err != nil {
		return Adapter{}, fmt.Errorf("import: %w", err)
	}
	temp, err := os.MkdirTemp(r.dir, importPrefix+"*")
	if err != nil {
		return Adapter{}, fmt.Errorf("import adapter %q: %w", m.Name, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }() // after Publish there is nothing left to remove
	for _, name := range append(slices.Sorted(maps.Keys(m.Files)), lora.ManifestFile) {
		if err := linkOrCopy(filepath.Join(dir, name), filepath.Join(temp, name)); err != nil {
			return Adapter{}, fmt.Errorf("import adapter %q: %w", m.Name, err)
		}
	}
	return r.Publish(ctx, temp)
}

func linkOrCopy(from, to string) error {
	if os.Link(from, to) == nil {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}

// Lookup returns the adapter with this name. It returns ErrNotFound, or why the adapter cannot be served.
// Use Acquire to serve it.
func (r *Registry) Lookup(name string) (Adapter, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, err := r.find(name)
	if err != nil {
		return Adapter{}, err
	}
	return e.adapter, nil
}

func (r *Registry) find(name string) (*entry, error) {
	if r.byName[name] == nil {
		r.look()
	}
	e := r.byName[name]
	if e == nil {
		return nil, fmt.Errorf("adapter %q: %w", name, ErrNotFound)
	}
	return e, e.broken
}

// List returns the adapters that can be served, oldest first. A complete directory that was put beside the others is
// taken up by this, and by Lookup of its name.
func (r *Registry) List() []Adapter {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.look()
	list := make([]Adapter, 0, len(r.order))
	for _, e := range r.order {
		if e.broken == nil {
			list = append(list, e.adapter)
		}
	}
	return list
}

// Ref is one use of an adapter: its files stay until Release, even if it is deleted meanwhile.
type Ref struct {
	Adapter

	registry *Registry
	entry    *entry
	once     sync.Once
}

// Acquire returns the adapter with this name in use, for a request. The caller calls Release when the request's stream has
// ended. Errors are those of Lookup.
func (r *Registry) Acquire(name string) (*Ref, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, err := r.find(name)
	if err != nil {
		return nil, err
	}
	e.users++
	return &Ref{Adapter: e.adapter, registry: r, entry: e}, nil
}

// Release ends the use. Only the first call counts. The last user of a deleted adapter removes its files; if that fails, it
// is logged, and the next start does it.
func (ref *Ref) Release() {
	ref.once.Do(func() {
		r := ref.registry
		r.mu.Lock()
		defer r.mu.Unlock()
		ref.entry.users--
		if ref.entry.users > 0 || !ref.entry.deleted {
			return
		}
		// Not the request's context: the request has ended.
		if err := r.remove(context.Background(), ref.ID); err != nil {
			r.logger.Error("remove a deleted adapter", "adapter", ref.Name, "error", err)
		}
	})
}

// Delete makes the adapter with this name unknown at once, and removes its files when nobody uses it any more. It returns
// ErrNotFound, and *store.AdapterInUseError while an unfinished job goes on from the adapter. A damaged adapter can be deleted too.
func (r *Registry) Delete(ctx context.Context, name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.byName[name]
	if e == nil {
		return fmt.Errorf("delete adapter %q: %w", name, ErrNotFound)
	}
	if err := r.store.HideAdapter(ctx, e.adapter.ID); err != nil {
		return fmt.Errorf("delete adapter %q: %w", name, err)
	}
	delete(r.byName, name)
	r.order = slices.DeleteFunc(r.order, func(other *entry) bool { return other == e })
	e.deleted = true
	r.hidden[e.adapter.ID] = true
	if e.users > 0 {
		return nil
	}
	if err := r.remove(ctx, e.adapter.ID); err != nil {
		return fmt.Errorf("delete adapter %q: %w", name, err)
	}
	return nil
}

// remove removes the files and then the row of a hidden adapter. The manifest goes first: what is half-removed is no
// adapter.
func (r *Registry) remove(ctx context.Context, id string) error {
	if err := r.root.Remove(filepath.Join(id, lora.ManifestFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := r.root.RemoveAll(id); err != nil {
		return err
	}
	if err := durable.SyncDir(r.dir); err != nil {
		return err
	}
	delete(r.hidden, id)
	if r.gone != nil {
		r.gone(id)
	}
	return r.store.RemoveAdapter(ctx, id)
}

// syncAndCheck makes sure that a file is on disk and has the sha256 digest want.
func syncAndCheck(path, want string) (err error) {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := file.Sync(); err != nil {
		return err
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != want {
		return fmt.Errorf("%s has sha256 %s, the manifest says %s", path, got, want)
	}
	return nil
}

// Name is the model name of an adapter: ft:<base>:local:<suffix>:<id>. Of the suffix, letters, digits, '.', '-' and '_' are
// kept and everything else becomes '-', so that a name has the same number of colons always and fits into a URL path.
func Name(base, suffix, id string) string {
	suffix = strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-", c) {
			return c
		}
		return '-'
	}, suffix)
	return "ft:" + base + ":local:" + suffix + ":" + id
}
