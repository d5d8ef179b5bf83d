package store_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/store"
)

// A database that was removed takes no blob with it, also when the new one has files.
func TestLostDatabase(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	st := open(t, dir, store.Options{})
	old := create(t, st, "a", "old content")
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, store.DatabaseFile)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		st = open(t, dir, store.Options{})
		create(t, st, "b", "new content")
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := filepath.Glob(filepath.Join(dir, store.LostDir, "*", "*", old.SHA256))
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept %v, %v", kept, err)
	}
	if data, err := os.ReadFile(kept[0]); string(data) != "old content" {
		t.Errorf("kept %q, %v", data, err)
	}
	in, err := store.Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	found, err := in.Blobs(t.Context())
	if err != nil || len(found) != 1 || !strings.HasPrefix(kept[0], filepath.Join(dir, found[0].What)) || found[0].Leftover {
		t.Errorf("found %+v, %v; kept %s", found, err, kept)
	}
}

// A file whose content is missing or cut off says so until the content comes back.
func TestDamagedContent(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(path string) error{
		"is missing":             os.Remove,
		"has 3 bytes and not 11": func(path string) error { return os.Truncate(path, 3) },
	} {
		dir := t.TempDir()
		st := open(t, dir, store.Options{})
		file := create(t, st, "a", "the content")
		path, err := st.FilePath(t.Context(), file.ID)
		if err == nil {
			err = errors.Join(st.Close(), damage(path))
		}
		if err != nil {
			t.Fatal(err)
		}
		st = open(t, dir, store.Options{})
		list, _, err := st.Files(t.Context(), store.FileQuery{})
		if err != nil || !slices.ContainsFunc(list, func(f store.File) bool { return strings.Contains(f.Damage, name) }) {
			t.Errorf("the start saw %+v, %v", list, err)
		}
		lost := new(store.ContentError)
		if _, _, err := st.OpenFile(t.Context(), file.ID); !errors.As(err, &lost) || lost.FileID != file.ID || lost.Problem != name {
			t.Errorf("OpenFile: %v, want that it %s", err, name)
		}
		create(t, st, "b", "the content")
		_, content, err := st.OpenFile(t.Context(), file.ID)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(content)
		if err = errors.Join(err, content.Close()); err != nil || string(data) != "the content" {
			t.Errorf("after the upload: %q, %v", data, err)
		}
		if now, err := st.File(t.Context(), file.ID); err != nil || now.Damage != "" {
			t.Errorf("after the upload: %+v, %v", now, err)
		}
	}
}

// A letter of the schema has become another: SQLite would not see it before a statement fails, or a rule is gone.
func TestDamagedSchema(t *testing.T) {
	t.Parallel()
	for _, change := range [][2]string{{"filename   TEXT", "filenane   TEXT"}, {"failures        INTEGER NOT NULL DEFAULT 0", "failures        INTEGER NOT NULL DEFAULT 1"}} {
		dir := t.TempDir()
		st := open(t, dir, store.Options{})
		kept := create(t, st, "a", "content")
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, store.DatabaseFile)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		damaged := strings.ReplaceAll(string(data), change[0], change[1])
		if damaged == string(data) {
			t.Fatalf("the schema has no %q", change[0])
		}
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Open(t.Context(), dir, store.Options{}); err == nil || !strings.Contains(err.Error(), "hone fsck --repair") {
			t.Errorf("%s: Open = %v; want what to do", change[1], err)
		}
		in, err := store.Inspect(dir)
		if err != nil {
			t.Fatal(err)
		}
		found, err := in.Database(t.Context())
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: found %+v, %v", change[1], found, err)
		}
		if err := found[0].Repair(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		st = open(t, dir, store.Options{})
		if file, err := st.File(t.Context(), kept.ID); err != nil || file != kept {
			t.Errorf("%s: after the repair the file is %+v, %v; it was %+v", change[1], file, err, kept)
		}
	}
}
