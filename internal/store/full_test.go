package store_test

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/hone-llm/hone/internal/store"
)

// A database that cannot grow is a full disk, and goes on when there is room.
func TestDatabaseFull(t *testing.T) {
	t.Parallel()
	st, err := store.Open(t.Context(), t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := st.Exec(t.Context(), `PRAGMA max_page_count = 60`); err != nil {
		t.Fatal(err)
	}
	put := func(i int) error {
		name := fmt.Sprintf("ft:%d:%s", i, strings.Repeat("x", 1000))
		return st.PutAdapter(t.Context(), store.Adapter{ID: fmt.Sprint(i), Name: name})
	}
	n := 0
	for err = put(n); err == nil && n < 1000; err = put(n) {
		n++
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d rows: %v, want ENOSPC", n, err)
	}
	if err := st.Exec(t.Context(), `PRAGMA max_page_count = 1000`); err != nil {
		t.Fatal(err)
	}
	if err := put(n); err != nil {
		t.Errorf("with room: %v", err)
	}
	if rows, err := st.Adapters(t.Context()); err != nil || len(rows) != n+1 {
		t.Errorf("%d rows, want %d, %v", len(rows), n+1, err)
	}
}

func TestUnfinishedJobs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if ids, err := store.UnfinishedJobs(t.Context(), dir, "base"); err != nil || len(ids) != 0 {
		t.Errorf("without a database: %v, %v", ids, err)
	}
	st, err := store.Open(t.Context(), dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	file, err := st.CreateFile(t.Context(), "a", "fine-tune", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	for i, job := range []store.Job{{Model: "base", Status: "queued"}, {Model: "other", Status: "running"}, {Model: "base", Status: "failed"}, {Model: "base", Status: "running"}} {
		job.ID, job.AdapterID, job.AdapterName, job.TrainingFile = fmt.Sprint(i), fmt.Sprint(i), fmt.Sprint(i), file.ID
		if err := st.CreateJob(t.Context(), job); err != nil {
			t.Fatal(err)
		}
	}
	if ids, err := store.UnfinishedJobs(t.Context(), dir, "base"); err != nil || strings.Join(ids, " ") != "0 3" {
		t.Errorf("beside an open store: %v, %v", ids, err)
	}
}
