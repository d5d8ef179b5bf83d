package adapters_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

const digest = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// home is a data directory with an open store and registry.
type home struct {
	t        *testing.T
	dir      string
	store    *store.Store
	registry *adapters.Registry
	removed  []string // ids that the registry has told
}

func openHome(t *testing.T) *home {
	t.Helper()
	h := &home{t: t, dir: t.TempDir()}
	h.open()
	t.Cleanup(h.close)
	return h
}

func (h *home) open() {
	h.t.Helper()
	var err error
	if h.store, err = store.Open(h.t.Context(), h.dir, store.Options{}); err != nil {
		h.t.Fatal(err)
	}
	if h.registry, err = adapters.Open(h.t.Context(), filepath.Join(h.dir, "adapters"), h.store, adapters.Options{Removed: func(id string) { h.removed = append(h.removed, id) }}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *home) close() {
	h.t.Helper()
	if err := errors.Join(h.registry.Close(), h.store.Close()); err != nil {
		h.t.Error(err)
	}
}

// restart closes everything and opens it again.
func (h *home) restart() {
	h.t.Helper()
	h.close()
	h.open()
}

// write makes an adapter directory as a trainer does, and returns it with its name.
func (h *home) write(id string) (dir, name string) {
	h.t.Helper()
	return writeAdapter(h.t, filepath.Join(h.dir, "jobs", id), id), adapters.Name("base", "s", id)
}

func writeAdapter(t *testing.T, dir, id string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := lora.Manifest{
		ID: id, Name: adapters.Name("base", "s", id), BaseModel: "base", BaseDigest: digest, JobID: "ftjob-1", CreatedAt: 1,
		Rank: 16, Alpha: 32, TargetModules: []string{"q_proj"}, MaxLength: 128, Files: map[string]string{},
	}
	for _, name := range []string{lora.GGUFFile, lora.PEFTWeights, lora.PEFTConfig} {
		content := []byte(name + " of " + id)
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		m.Files[name] = hex.EncodeToString(sum[:])
	}
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, lora.ManifestFile), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (h *home) names() (names []string) {
	for _, a := range h.registry.List() {
		names = append(names, a.Name)
	}
	return names
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func TestPublish(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	dir, name := h.write("one")
	published, err := h.registry.Publish(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if exists(dir) || !exists(published.GGUF()) || published.Name != name {
		t.Errorf("published %+v; source still there: %v", published, exists(dir))
	}
	// Again, as a job does whose end was lost in a crash.
	dir, _ = h.write("one")
	again, err := h.registry.Publish(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(published, again); diff != "" || exists(dir) {
		t.Errorf("published again (-first +second)\n%s", diff)
	}
	h.restart()
	found, err := h.registry.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(published, found); diff != "" {
		t.Errorf("after a restart (-before +after)\n%s", diff)
	}
	if err := found.CheckBase(digest); err != nil {
		t.Error(err)
	}
	var mismatch *adapters.BaseMismatchError
	if err := found.CheckBase(strings.Repeat("b", 64)); !errors.As(err, &mismatch) || mismatch.Want != digest {
		t.Errorf("CheckBase with another digest = %v", err)
	}
}

func TestPublishRefusesDamage(t *testing.T) {
	t.Parallel()
	damage := map[string]func(dir string) error{
		"no manifest":  func(dir string) error { return os.Remove(filepath.Join(dir, lora.ManifestFile)) },
		"truncated":    func(dir string) error { return os.Truncate(filepath.Join(dir, lora.GGUFFile), 3) },
		"file missing": func(dir string) error { return os.Remove(filepath.Join(dir, lora.PEFTConfig)) },
		"manifest cut": func(dir string) error { return os.Truncate(filepath.Join(dir, lora.ManifestFile), 40) },
		"manifest empty": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, lora.ManifestFile), []byte("{}"), 0o600)
		},
		"id escapes": func(dir string) error {
			data, err := os.ReadFile(filepath.Join(dir, lora.ManifestFile))
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, lora.ManifestFile), []byte(strings.Replace(string(data), `"id":"one"`, `"id":"../one"`, 1)), 0o600)
		},
	}
	for name, break_ := range damage {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := openHome(t)
			dir, _ := h.write("one")
			if err := break_(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := h.registry.Publish(t.Context(), dir); err == nil {
				t.Error("Publish = nil error")
			}
			if names := h.names(); len(names) != 0 || !exists(dir) {
				t.Errorf("adapters %v; source there: %v", names, exists(dir))
			}
		})
	}
}

func TestDeleteWaitsForUsers(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	dir, name := h.write("one")
	published, err := h.registry.Publish(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	first, err := h.registry.Acquire(name)
	if err != nil {
		t.Fatal(err)
	}
	second, err := h.registry.Acquire(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.registry.Delete(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	if _, err := h.registry.Acquire(name); !errors.Is(err, adapters.ErrNotFound) {
		t.Errorf("Acquire after Delete = %v", err)
	}
	if err := h.registry.Delete(t.Context(), name); !errors.Is(err, adapters.ErrNotFound) {
		t.Errorf("Delete again = %v", err)
	}
	first.Release()
	first.Release() // does not count twice
	if len(h.removed) > 0 || !exists(published.GGUF()) {
		t.Error("files are gone while in use")
	}
	second.Release()
	if exists(published.Dir) {
		t.Error("files are there after the last user")
	}
	if !slices.Equal(h.removed, []string{published.ID}) {
		t.Errorf("removed: %v", h.removed)
	}
	h.restart()
	if names := h.names(); len(names) != 0 {
		t.Errorf("after a restart: %v", names)
	}
}

// A server killed between the steps of Delete and of Publish leaves nothing that the next start does not put right.
func TestStartRepairs(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	dir, deleted := h.write("deleted")
	if _, err := h.registry.Publish(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	dir, damaged := h.write("damaged")
	bad, err := h.registry.Publish(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := h.registry.Acquire(deleted)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.registry.Delete(t.Context(), deleted); err != nil { // hidden, and the user never releases it
		t.Fatal(err)
	}
	if err := os.Remove(bad.GGUF()); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(h.dir, "adapters")
	writeAdapter(t, filepath.Join(root, "rowless"), "rowless")
	foreign := filepath.Join(root, "notes")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}

	h.restart()
	if exists(ref.Dir) {
		t.Error("the deleted adapter's files are still there")
	}
	if diff := cmp.Diff([]string{adapters.Name("base", "s", "rowless")}, h.names()); diff != "" {
		t.Errorf("adapters (-want +got)\n%s", diff)
	}
	if _, err := h.registry.Lookup(damaged); err == nil || errors.Is(err, adapters.ErrNotFound) {
		t.Errorf("Lookup of a damaged adapter = %v; want why it cannot be served", err)
	}
	if !exists(foreign) {
		t.Error("a directory that is not ours was removed")
	}
	// Training it again mends it.
	dir, _ = h.write("damaged")
	if _, err := h.registry.Publish(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := h.registry.Delete(t.Context(), damaged); err != nil {
		t.Fatal(err)
	}
	h.restart()
	if diff := cmp.Diff([]string{adapters.Name("base", "s", "rowless")}, h.names()); diff != "" {
		t.Errorf("adapters at the end (-want +got)\n%s", diff)
	}
}

func TestName(t *testing.T) {
	t.Parallel()
	for suffix, want := range map[string]string{
		"":           "ft:m:local::x",
		"quiz":       "ft:m:local:quiz:x",
		"my quiz:/2": "ft:m:local:my-quiz--2:x",
		"测试":         "ft:m:local:--:x",
	} {
		if got := adapters.Name("m", suffix, "x"); got != want {
			t.Errorf("Name(m, %q, x) = %q, want %q", suffix, got, want)
		}
	}
}

// TestImport takes an adapter up whose directory stays its owner's.
func TestImport(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	dir, _ := h.write("one")
	if _, err := h.registry.Import(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := h.registry.Import(t.Context(), dir); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	// What an interrupted import leaves is removed at the next start.
	left := filepath.Join(h.dir, "adapters", ".import-x")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	h.restart()
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", left, err)
	}
	list := h.registry.List()
	if len(list) != 1 {
		t.Fatalf("adapters %v", list)
	}
	if _, err := os.Stat(list[0].GGUF()); err != nil {
		t.Error(err)
	}
	if _, err := h.registry.Import(t.Context(), dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is gone: %v", err)
	}
}

// TestTakeUp finds a directory that appears while the registry is open, and not one that was deleted.
func TestTakeUp(t *testing.T) {
	t.Parallel()
	h := openHome(t)
	dir, _ := h.write("two")
	m, err := lora.ReadManifest(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.registry.Lookup(m.Name); !errors.Is(err, adapters.ErrNotFound) {
		t.Fatal(err)
	}
	if err := os.Rename(dir, filepath.Join(h.dir, "adapters", m.ID)); err != nil {
		t.Fatal(err)
	}
	ref, err := h.registry.Acquire(m.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.registry.Delete(t.Context(), m.Name); err != nil {
		t.Fatal(err)
	}
	if list := h.registry.List(); len(list) != 0 {
		t.Errorf("a deleted adapter that is in use is back: %v", list)
	}
	ref.Release()
	if list := h.registry.List(); len(list) != 0 {
		t.Errorf("a deleted adapter is back: %v", list)
	}
}
