package store_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/store"
)

// clock is a time that tests move.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func addPart(t *testing.T, st *store.Store, upload store.Upload, content string) store.UploadPart {
	t.Helper()
	blob, err := st.Stage(t.Context(), strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	part, err := st.AddPart(t.Context(), upload.ID, blob)
	if err != nil {
		t.Fatal(err)
	}
	return part
}

// blobs are the digests on disk.
func blobs(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestUploads(t *testing.T) {
	t.Parallel()
	dir, at := t.TempDir(), &clock{time.Unix(1_000_000, 0)}
	st := open(t, dir, store.Options{Now: at.Now})
	create := func(bytes int64) store.Upload {
		t.Helper()
		u, err := st.CreateUpload(t.Context(), store.Upload{Filename: "a.jsonl", Purpose: "batch", MimeType: "text/jsonl", Bytes: bytes, Lifetime: 2 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	u := create(9)
	if u.Status != store.UploadPending || u.ExpiresAt != u.CreatedAt+3600 {
		t.Errorf("created %+v", u)
	}
	b, a, again := addPart(t, st, u, "world"), addPart(t, st, u, "hell"), addPart(t, st, u, "hell")
	for name, test := range map[string]struct {
		ids   []string
		md5   string
		param string
	}{
		"unknown part":  {[]string{a.ID, "part_none"}, "", "part_ids[1]"},
		"part twice":    {[]string{a.ID, a.ID}, "", "part_ids[1]"},
		"too short":     {[]string{a.ID}, "", "part_ids"},
		"too long":      {[]string{a.ID, again.ID, b.ID}, "", "part_ids"},
		"another order": {[]string{b.ID, a.ID}, "0c2aa4b059c95e3c034f696834f6523f", "md5"},
	} {
		refused := new(store.UploadError)
		if _, _, err := st.CompleteUpload(t.Context(), u.ID, test.ids, test.md5); !errors.As(err, &refused) || refused.Param != test.param || refused.Message == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What was sent is there after a restart.
	st.Close()
	st = open(t, dir, store.Options{Now: at.Now})
	done, file, err := st.CompleteUpload(t.Context(), u.ID, []string{a.ID, b.ID}, "0C2AA4B059C95E3C034F696834F6523F")
	if err != nil || done.Status != store.UploadCompleted || done.FileID != file.ID || file.Bytes != 9 || file.Purpose != "batch" || file.ExpiresAt != at.now.Unix()+7200 {
		t.Fatalf("completed %+v, %+v, %v", done, file, err)
	}
	_, content, err := st.OpenFile(t.Context(), file.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	if text, err := io.ReadAll(content); err != nil || string(text) != "hellworld" {
		t.Errorf("content %q, %v", text, err)
	}
	if left := blobs(t, dir); len(left) != 1 {
		t.Errorf("blobs %v: the parts' are to be gone", left)
	}
	if _, err := st.CancelUpload(t.Context(), u.ID); !errors.As(err, new(*store.UploadError)) {
		t.Errorf("cancel of a completed upload: %v", err)
	}

	// A part with the content of a file shares its blob; giving up the upload leaves it.
	u = create(9)
	addPart(t, st, u, "hellworld")
	addPart(t, st, u, "other")
	if u, err = st.CancelUpload(t.Context(), u.ID); err != nil || u.Status != store.UploadCancelled {
		t.Errorf("cancelled %+v, %v", u, err)
	}
	if left := blobs(t, dir); len(left) != 1 {
		t.Errorf("blobs after the cancel %v", left)
	}
	u = create(4)
	addPart(t, st, u, "late")
	at.now = at.now.Add(time.Hour)
	if late, err := st.Upload(t.Context(), u.ID); err != nil || late.Status != store.UploadExpired {
		t.Errorf("after an hour %+v, %v", late, err)
	}
	blob, err := st.Stage(t.Context(), strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.AddPart(t.Context(), u.ID, blob); !errors.As(err, new(*store.UploadError)) {
		t.Errorf("part of an expired upload: %v", err)
	}
	if err := st.Expire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := blobs(t, dir); len(left) != 1 {
		t.Errorf("blobs after the expiry %v", left)
	}
	if temps, err := os.ReadDir(filepath.Join(dir, "blobs", "tmp")); err != nil || len(temps) > 0 {
		t.Errorf("temporary files %v, %v", temps, err)
	}
	if _, err := st.Upload(t.Context(), "upload_none"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown upload: %v", err)
	}
}

func TestFilesExpire(t *testing.T) {
	t.Parallel()
	dir, at := t.TempDir(), &clock{time.Unix(1_000_000, 0)}
	st := open(t, dir, store.Options{Now: at.Now})
	add := func(content string, lifetime time.Duration) store.File {
		t.Helper()
		blob, err := st.Stage(t.Context(), strings.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		file, err := st.AddFile(t.Context(), blob, store.NewFile{Filename: "a", Purpose: "batch", Lifetime: lifetime})
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	forever, hour, used := add("a", 0), add("b", time.Hour), add("c", time.Hour)
	if forever.ExpiresAt != 0 || hour.ExpiresAt != hour.CreatedAt+3600 {
		t.Errorf("files %+v and %+v", forever, hour)
	}
	batch := store.Batch{ID: store.NewBatchID(), Status: "validating", InputFile: used.ID}
	if err := st.CreateBatch(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	exists := func(file store.File) bool {
		_, err := st.File(t.Context(), file.ID)
		return err == nil
	}
	at.now = at.now.Add(time.Hour - time.Second)
	if err := st.Expire(t.Context()); err != nil || !exists(hour) {
		t.Errorf("a second before: %v", err)
	}
	at.now = at.now.Add(time.Second)
	// A start looks, too.
	st.Close()
	st = open(t, dir, store.Options{Now: at.Now})
	if exists(hour) || !exists(forever) || !exists(used) {
		t.Error("the wrong files are there")
	}
	if _, err := st.FinishBatch(t.Context(), batch.ID, nil, func(b *store.Batch) error {
		b.Status = "failed"
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := st.Expire(t.Context()); err != nil || exists(used) {
		t.Errorf("after the batch: %v", err)
	}
}

func TestSpace(t *testing.T) {
	t.Parallel()
	st := open(t, t.TempDir(), store.Options{})
	if err := st.CheckSpace(1); err != nil {
		t.Error(err)
	}
	short := new(store.SpaceError)
	if err := st.CheckSpace(1 << 60); !errors.As(err, &short) || short.Need != 1<<60 || short.Free <= 0 || !strings.Contains(err.Error(), st.Dir()) {
		t.Errorf("more than there is: %v", err)
	}
}
