package fsck_test

import (
	"bytes"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/fsck"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

// home is a data directory with two files, two adapters and two jobs, all of them well. Its database is large enough that a
// page in its middle holds events only.
type home struct {
	t     *testing.T
	dir   string
	files [2]store.File
}

const (
	done    = "ftjob-done"
	running = "ftjob-running"
	stateOf = "jobs/" + running + "/a1/state-00000002"
)

func newHome(t *testing.T) *home {
	t.Helper()
	h := &home{t: t, dir: filepath.Join(t.TempDir(), "a home")}
	h.serve(func(st *store.Store) {
		for i := range h.files {
			var err error
			h.files[i], err = st.CreateFile(t.Context(), "train.jsonl", "fine-tune", strings.NewReader(fmt.Sprintf("content %d", i)))
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, id := range []string{done, running} {
			row := store.Job{
				ID: id, CreatedAt: 1, Status: "queued", Model: "m", BaseDigest: strings.Repeat("0", 64), TrainingFile: h.files[0].ID,
				Method: "supervised", AdapterID: "a-" + id, AdapterName: "ft:m:local::" + id, Requested: []byte(`{}`), Options: []byte(`{}`),
			}
			if err := st.CreateJob(t.Context(), row, store.Event{Level: "info", Type: "message", Message: "created"}); err != nil {
				t.Fatal(err)
			}
			status := map[string]string{done: "succeeded", running: "running"}[id]
			var events []store.Event
			for range 150 {
				events = append(events, store.Event{Level: "info", Type: "message", Message: strings.Repeat("x", 200)})
			}
			if _, err := st.UpdateJob(t.Context(), store.JobUpdate{ID: id, Attempt: store.AnyAttempt, Events: events, Change: func(row *store.Job) error {
				row.Status = status
				return nil
			}}); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, id := range []string{"one", "two"} {
		h.adapter(id)
	}
	h.write(stateOf+"/state.safetensors", "weights")
	h.write(stateOf+"/state.json", fmt.Sprintf(`{"state_sha256":%q}`, digest("weights")))
	h.write("jobs/"+done+"/trainer.log", "said")
	h.serve(func(*store.Store) {}) // takes up the adapters
	return h
}

// serve starts and stops what of a server has the directory.
func (h *home) serve(do func(st *store.Store)) {
	h.t.Helper()
	st, err := store.Open(h.t.Context(), h.dir, store.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	registry, err := adapters.Open(h.t.Context(), filepath.Join(h.dir, "adapters"), st, adapters.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	do(st)
	if err := errors.Join(registry.Close(), st.Close()); err != nil {
		h.t.Fatal(err)
	}
}

func (h *home) path(name string) string { return filepath.Join(h.dir, filepath.FromSlash(name)) }

func (h *home) write(name, content string) {
	h.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(h.path(name)), 0o700), os.WriteFile(h.path(name), []byte(content), 0o600)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *home) remove(name string) {
	h.t.Helper()
	if err := os.RemoveAll(h.path(name)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *home) exec(statement string) {
	h.t.Helper()
	db, err := sql.Open("sqlite", h.path(store.DatabaseFile))
	if err != nil {
		h.t.Fatal(err)
	}
	_, err = db.ExecContext(h.t.Context(), statement)
	if err := errors.Join(err, db.Close()); err != nil {
		h.t.Fatal(err)
	}
}

func (h *home) adapter(id string) {
	h.t.Helper()
	m := lora.Manifest{
		ID: id, Name: "ft:m:local::" + id, BaseModel: "m", BaseDigest: strings.Repeat("0", 64), JobID: done, CreatedAt: 1, Rank: 8, Alpha: 16,
		Files: map[string]string{lora.GGUFFile: digest(id)},
	}
	data, err := json.Marshal(m)
	if err != nil {
		h.t.Fatal(err)
	}
	h.write("adapters/"+id+"/"+lora.GGUFFile, id)
	h.write("adapters/"+id+"/"+lora.ManifestFile, string(data))
}

func (h *home) blob(i int) string {
	return "blobs/sha256/" + h.files[i].SHA256[:2] + "/" + h.files[i].SHA256
}

func digest(content string) string {
	sum := sha256.Sum256([]byte(content))
	return hex.EncodeToString(sum[:])
}

// tree is every file of the directory with its content, but the lock and the database, whose bytes are SQLite's.
func (h *home) tree() map[string]string {
	h.t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(h.dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() || strings.HasPrefix(entry.Name(), store.DatabaseFile) || entry.Name() == "hone.lock" {
			return err
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(h.dir, path)
		files[name] = string(content)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return files
}

func (h *home) check(repair bool) fsck.Report {
	h.t.Helper()
	report, err := fsck.Check(h.t.Context(), h.dir, fsck.Options{Repair: repair})
	if err != nil {
		h.t.Fatal(err)
	}
	return report
}

// Each kind of damage by itself: it is found by name, looking changes nothing, and after a repair all is well. What the
// next start clears up is well after that too.
func TestCheck(t *testing.T) {
	t.Parallel()
	orphan := digest("orphan")
	for _, tt := range []struct {
		name     string
		damage   func(h *home)
		want     func(h *home) []string // what is found, and what is wrong with it
		leftover bool
		start    bool   // the server's start clears it up
		lost     string // content of the file in lost+found
		person   bool   // no repair
	}{
		{name: "nothing"},
		{name: "blob damaged", damage: func(h *home) { h.write(h.blob(1), "Content 1") }, lost: "Content 1",
			want: func(h *home) []string { return []string{"files " + h.files[1].ID + ": its content is damaged"} }},
		{name: "blob missing", damage: func(h *home) { h.remove(h.blob(1)) },
			want: func(h *home) []string { return []string{"files " + h.files[1].ID + ": its content is missing"} }},
		{name: "row with another size", damage: func(h *home) { h.exec(`UPDATE files SET bytes = 3`) },
			want: func(h *home) []string {
				return []string{"files " + h.files[0].ID + ": its row says 3 bytes, its content has 9", "files " + h.files[1].ID + ": its row says 3 bytes"}
			}},
		{name: "blob without a row", leftover: true, start: true, damage: func(h *home) { h.write("blobs/sha256/"+orphan[:2]+"/"+orphan, "orphan") },
			want: func(*home) []string {
				return []string{"blobs/sha256/" + orphan[:2] + "/" + orphan + ": no row names it"}
			}},
		{name: "upload cut off", leftover: true, start: true, damage: func(h *home) { h.write("blobs/tmp/abc", "half") },
			want: func(*home) []string { return []string{"blobs/tmp/abc: an upload was cut off"} }},
		{name: "strange file", person: true, damage: func(h *home) { h.write("blobs/sha256/readme", "x") },
			want: func(*home) []string { return []string{"blobs/sha256/readme: it has not the name of a blob"} }},
		{name: "adapter damaged", lost: "oNe", damage: func(h *home) { h.write("adapters/one/adapter.gguf", "oNe") },
			want: func(*home) []string { return []string{"adapter ft:m:local::one: adapter.gguf is damaged"} }},
		{name: "adapter truncated", damage: func(h *home) { h.remove("adapters/one/adapter.gguf") },
			want: func(*home) []string { return []string{"adapter ft:m:local::one: open "} }},
		{name: "adapter gone", damage: func(h *home) { h.remove("adapters/one") },
			want: func(*home) []string { return []string{"adapter ft:m:local::one: adapter manifest: "} }},
		{name: "adapter of another row", damage: func(h *home) { h.exec(`UPDATE adapters SET base_digest = 'ff' WHERE id = 'one'`) },
			want: func(*home) []string { return []string{"adapter ft:m:local::one: its manifest is that of"} }},
		{name: "adapter half deleted", leftover: true, start: true, damage: func(h *home) {
			h.exec(`UPDATE adapters SET deleted = 1 WHERE id = 'one'`)
			h.remove("adapters/one/manifest.json")
		}, want: func(*home) []string { return []string{"adapter ft:m:local::one: its deletion was cut off"} }},
		{name: "adapter without a row", leftover: true, start: true, person: true, damage: func(h *home) { h.adapter("three") },
			want: func(*home) []string { return []string{"adapters/three: the adapter has no row"} }},
		{name: "import cut off", leftover: true, start: true, damage: func(h *home) { h.write("adapters/.import-1/adapter.gguf", "x") },
			want: func(*home) []string { return []string{"adapters/.import-1: taking up an adapter was cut off"} }},
		{name: "half an adapter without a row", lost: "x", damage: func(h *home) { h.write("adapters/four/adapter.gguf", "x") },
			want: func(*home) []string { return []string{"adapters/four: it has no row and is no adapter"} }},
		{name: "job without a row", lost: "x", damage: func(h *home) { h.write("jobs/ftjob-none/a1/x", "x") },
			want: func(*home) []string { return []string{"jobs/ftjob-none: the job has no row"} }},
		{name: "dry run cut off", leftover: true, damage: func(h *home) { h.write("jobs/.dry-run-1/x", "x") },
			want: func(*home) []string { return []string{"jobs/.dry-run-1: a dry run was cut off"} }},
		{name: "states of a finished job", leftover: true, damage: func(h *home) { h.write("jobs/"+done+"/a1/state-00000001/state.json", "x") },
			want: func(*home) []string { return []string{"jobs/" + done + "/a1/state-00000001: the job is succeeded"} }},
		{name: "resume state damaged", damage: func(h *home) { h.write(stateOf+"/state.safetensors", "weightz") },
			want: func(*home) []string { return []string{stateOf + ": the resume state is damaged"} }},
		{name: "model cut off", leftover: true, damage: func(h *home) { h.write("models/.tmp-1/base.gguf", "x") },
			want: func(*home) []string { return []string{"models/.tmp-1: adding a model was cut off"} }},
		{name: "model damaged", lost: "{}", damage: func(h *home) { h.write("models/m/manifest.json", "{}") },
			want: func(*home) []string { return []string{"model m: "} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHome(t)
			var want []string
			if tt.damage != nil {
				tt.damage(h)
				want = tt.want(h)
			}
			before := h.tree()
			report := h.check(false)
			if diff := cmp.Diff(before, h.tree()); diff != "" {
				t.Errorf("looking changed the directory\n%s", diff)
			}
			var got []string
			for _, f := range report.Findings {
				got = append(got, f.What+": "+f.Problem)
				if f.Leftover != tt.leftover || f.Remedy == "" || (f.Repair == nil) != tt.person {
					t.Errorf("finding %+v", f)
				}
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.EqualFunc(got, want, strings.HasPrefix) {
				t.Fatalf("found %q, want %q", got, want)
			}
			if left := report.Left(); (left == 0) != (tt.leftover || len(want) == 0) {
				t.Errorf("%d left", left)
			}
			switch {
			case tt.start:
				h.serve(func(*store.Store) {})
			case !tt.person:
				if report := h.check(true); report.Left() > 0 || len(report.Findings) != len(want) {
					t.Errorf("repair: %+v", report)
				}
			default:
				return
			}
			if report := h.check(false); len(report.Findings) > 0 {
				t.Errorf("still found: %+v", report.Findings)
			}
			lost := ""
			for name, content := range h.tree() {
				if strings.HasPrefix(name, store.LostDir) && filepath.Base(name) != lora.ManifestFile || strings.HasSuffix(name, "-m/manifest.json") {
					lost = content
				}
			}
			if tt.lost != "" && lost != tt.lost {
				t.Errorf("lost+found has %q, want %q", lost, tt.lost)
			}
			h.serve(func(*store.Store) {})
		})
	}
}

// A damaged page in the database's middle: the server refuses to start or the damage is found, and a repair keeps all rows
// but those of the page, and the old database.
func TestSalvage(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	database := h.path(store.DatabaseFile)
	data, err := os.ReadFile(database)
	if err != nil {
		t.Fatal(err)
	}
	const page = 4096
	middle := len(data) / page / 2 * page
	copy(data[middle:middle+page], bytes.Repeat([]byte{0xa5}, page))
	if err := os.WriteFile(database, data, 0o600); err != nil {
		t.Fatal(err)
	}
	report := h.check(false)
	if len(report.Findings) != 1 || report.Findings[0].What != store.DatabaseFile || report.Left() != 1 {
		t.Fatalf("found %+v", report)
	}
	h.check(true)
	if report := h.check(false); len(report.Findings) > 0 {
		t.Errorf("after the repair: %+v", report.Findings)
	}
	h.serve(func(st *store.Store) {
		jobs, _, err := st.Jobs(t.Context(), store.JobQuery{Limit: 10})
		if err != nil || len(jobs) != 2 {
			t.Errorf("jobs %+v, %v", jobs, err)
		}
		events := 0
		for _, job := range jobs {
			page, _, err := st.Events(t.Context(), job.ID, "", 1000)
			if err != nil {
				t.Error(err)
			}
			events += len(page)
		}
		if events < 250 || events > 302 {
			t.Errorf("%d of 302 events are left", events)
		}
		for _, file := range h.files {
			if _, err := st.File(t.Context(), file.ID); err != nil {
				t.Error(err)
			}
		}
	})
	kept, err := filepath.Glob(h.path(store.LostDir + "/*-" + store.DatabaseFile))
	if err != nil || len(kept) != 1 {
		t.Fatalf("old databases %v, %v", kept, err)
	}
	if old, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(old, data) {
		t.Errorf("the old database was changed: %v", err)
	}
}

// No page of the database can be damaged so that examining and repairing fail.
func TestSalvageAnyPage(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	database := h.path(store.DatabaseFile)
	good, err := os.ReadFile(database)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(good); at += 4096 {
		for _, suffix := range []string{"-wal", "-shm"} {
			h.remove(store.DatabaseFile + suffix)
		}
		data := bytes.Clone(good)
		for i := at; i < at+4096; i++ {
			data[i] ^= 0x5a
		}
		if err := os.WriteFile(database, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if report := h.check(false); len(report.Findings) == 0 {
			t.Errorf("nothing found with a damaged page %d", at/4096)
		}
		report, err := fsck.Check(t.Context(), h.dir, fsck.Options{Repair: true})
		if err != nil {
			t.Fatalf("page %d: %v, %+v", at/4096, err, report)
		}
		// What the lost rows leave, adapters and blobs, is found by the first repair already.
		if report := h.check(false); report.Left() > 0 {
			t.Errorf("page %d: after the repair %+v", at/4096, report.Findings)
		}
		// Back to the beginning, for the next page.
		for _, name := range []string{"blobs", "adapters", "jobs", store.LostDir} {
			h.remove(name)
		}
		h.restore()
	}
}

// restore writes again what newHome wrote beside the database.
func (h *home) restore() {
	h.t.Helper()
	for i := range h.files {
		h.write(h.blob(i), fmt.Sprintf("content %d", i))
	}
	for _, id := range []string{"one", "two"} {
		h.adapter(id)
	}
	h.write(stateOf+"/state.safetensors", "weights")
	h.write(stateOf+"/state.json", fmt.Sprintf(`{"state_sha256":%q}`, digest("weights")))
}

func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	if _, err := fsck.Check(t.Context(), t.TempDir(), fsck.Options{}); err == nil || !strings.Contains(err.Error(), "no server has run here") {
		t.Errorf("an empty directory: %v", err)
	}
	h := newHome(t)
	h.serve(func(*store.Store) {
		var inUse *store.InUseError
		if _, err := fsck.Check(t.Context(), h.dir, fsck.Options{}); !errors.As(err, &inUse) || inUse.PID != os.Getpid() {
			t.Errorf("while a server has it: %v", err)
		}
	})
	h.exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`)
	if _, err := fsck.Check(t.Context(), h.dir, fsck.Options{Repair: true}); err == nil || !strings.Contains(err.Error(), "newer hone") {
		t.Errorf("a newer schema: %v", err)
	}
}
