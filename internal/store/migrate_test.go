package store_test

import (
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/store"
)

// raw opens the database of a data directory without the store.
func raw(t *testing.T, dir string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: filepath.Join(dir, "hone.db")}).String())
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { db.Close() })
	return db
}

// table is what a table holds: its columns, and its rows as column=value.
type table struct {
	columns []string
	rows    []map[string]string
}

// tables reads all tables but SQLite's and goose's own.
func tables(t *testing.T, db *sql.DB) map[string]table {
	t.Helper()
	names := query(t, db, `SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name <> 'goose_db_version'`)
	all := map[string]table{}
	for _, name := range names.rows {
		all[name["name"]] = query(t, db, `SELECT * FROM `+name["name"]+` ORDER BY 1, 2`)
	}
	return all
}

func query(t *testing.T, db *sql.DB, query string) (result table) {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), query)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer rows.Close()
	if result.columns, err = rows.Columns(); err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		values := make([]any, len(result.columns))
		into := make([]any, len(values))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		row := map[string]string{}
		for i, column := range result.columns {
			row[column] = fmt.Sprintf("%T %v", values[i], values[i])
			if s, ok := values[i].(string); ok {
				row[column] = s
			}
		}
		result.rows = append(result.rows, row)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return result
}

// Every earlier schema, with rows in every table, becomes today's: all rows are there with all that they said, the schema
// is that of a new directory, and the store reads them. testdata/schema-N.sql is what `sqlite3 hone.db .dump` said of a
// database of version N; the file is never changed, whatever becomes of the migrations.
func TestMigrate(t *testing.T) {
	t.Parallel()
	fresh := t.TempDir()
	open(t, fresh, store.Options{}).Close()
	freshDB := raw(t, fresh)
	const schema = `SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' AND tbl_name <> 'goose_db_version' ORDER BY type, name`
	wantSchema := query(t, freshDB, schema)

	migrations, err := filepath.Glob("migrations/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for i := range migrations {
		dump, err := os.ReadFile(fmt.Sprintf("testdata/schema-%05d.sql", i+1))
		if errors.Is(err, fs.ErrNotExist) && i == len(migrations)-1 {
			continue // the newest may wait for its release
		}
		if err != nil {
			t.Fatalf("%v: fill every table of a database of version %d and keep its dump", err, i+1)
		}
		t.Run(filepath.Base(migrations[i]), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			db := raw(t, dir)
			if _, err := db.ExecContext(t.Context(), string(dump)); err != nil {
				t.Fatal(err)
			}
			before := tables(t, db)
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}

			st := open(t, dir, store.Options{})
			db = raw(t, dir)
			if diff := cmp.Diff(wantSchema, query(t, db, schema), cmp.AllowUnexported(table{})); diff != "" {
				t.Errorf("schema (-new directory +migrated)\n%s", diff)
			}
			after := tables(t, db)
			for _, name := range slices.Sorted(maps.Keys(before)) {
				if len(before[name].rows) == 0 {
					t.Errorf("testdata has no rows in %s", name)
				}
				var kept []map[string]string
				for _, row := range after[name].rows {
					maps.DeleteFunc(row, func(column, _ string) bool { return !slices.Contains(before[name].columns, column) })
					kept = append(kept, row)
				}
				if diff := cmp.Diff(before[name].rows, kept); diff != "" {
					t.Errorf("%s (-before +after)\n%s", name, diff)
				}
			}
			readAll(t, st)
			if n := query(t, db, `PRAGMA foreign_key_check`); len(n.rows) > 0 {
				t.Errorf("dangling references: %v", n.rows)
			}
		})
	}
}

// readAll reads the rows of testdata/schema-*.sql through the store, and runs the job that was running.
func readAll(t *testing.T, st *store.Store) {
	t.Helper()
	files, _, err := st.Files(t.Context(), store.FileQuery{Ascending: true})
	if err != nil || len(files) < 2 || files[0].Filename != "数据.jsonl" || files[0].Bytes != 15 {
		t.Errorf("files %+v, %v", files, err)
	}
	jobs, _, err := st.Jobs(t.Context(), store.JobQuery{Limit: 10})
	if err != nil || len(jobs) != 3 {
		t.Fatalf("jobs %+v, %v", jobs, err)
	}
	done := jobs[2]
	if done.ID != "ftjob-done" || done.Metadata["team"] != "a" || *done.TrainLoss != 1.25 || !slices.Equal(done.ResultFiles, []string{"file-result"}) {
		t.Errorf("job %+v", done)
	}
	if events, _, err := st.Events(t.Context(), done.ID, "", 10); err != nil || len(events) != 2 {
		t.Errorf("events %+v, %v", events, err)
	}
	if at, err := st.MetricsAt(t.Context(), done.ID, 6); err != nil || len(at) != 1 {
		t.Errorf("metrics %+v, %v", at, err)
	}
	adapters, err := st.Adapters(t.Context())
	if err != nil || len(adapters) != 2 || adapters[0].Deleted || !adapters[1].Deleted {
		t.Errorf("adapters %+v, %v", adapters, err)
	}
	if err := st.Reclaim(t.Context()); err != nil {
		t.Error(err)
	}
	job, err := st.Claim(t.Context(), "me", 1, running)
	if err != nil || job.ID != "ftjob-runs" || job.Attempt != 2 || !strings.HasPrefix(job.AdapterName, "ft:") {
		t.Errorf("claimed %+v, %v", job, err)
	}
}
