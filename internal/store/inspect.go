package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/durable"
)

// LostDir is where repairs put what is damaged or belongs to nothing, below the data directory. Nothing reads it.
const LostDir = "lost+found"

// Finding is something in a data directory that is not as it should be.
type Finding struct {
	What    string `json:"what"`    // file file-abc, adapter ft:..., blobs/tmp/x
	Problem string `json:"problem"` // one sentence
	// Leftover says that nothing is lost: a process was killed, and the next start of the server or Repair clears it up.
	Leftover bool   `json:"leftover"`
	Remedy   string `json:"remedy"` // what Repair does, or else what a person can do
	// Repair mends it. It is nil if only a person can. Done twice, it changes nothing the second time.
	Repair   func(ctx context.Context) error `json:"-"`
	Repaired bool                            `json:"repaired"`
}

// Inspection is a data directory that is looked at as it is: it is locked against servers, but opening it migrates
// and removes nothing. Only the Repair of a Finding changes something.
type Inspection struct {
	dir  string
	root *os.Root
	lock *os.File
	db   *sql.DB // reads

	salvaged bool // the database is a new one, and may lack rows
}

// Inspect takes the data directory dir, which must have a database. It returns *InUseError while a server has it.
func Inspect(dir string) (_ *Inspection, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, DatabaseFile)); err != nil {
		return nil, fmt.Errorf("%w: no server has run here; name the directory of one with HONE_HOME or --data-dir", err)
	}
	i := &Inspection{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	if i.lock, err = takeLock(dir); err != nil {
		return nil, err
	}
	if i.root, err = os.OpenRoot(dir); err != nil {
		return nil, unusable(dir, err)
	}
	return i, i.Reopen()
}

// Reopen reads the database anew, after a repair has put another one in its place.
func (i *Inspection) Reopen() (err error) {
	if i.db != nil {
		if err := i.db.Close(); err != nil {
			return err
		}
	}
	i.db, err = openSQLite(filepath.Join(i.dir, DatabaseFile), "mode=ro", "query_only(1)")
	return err
}

// openSQLite opens a database with one connection.
func openSQLite(file, mode string, pragmas ...string) (*sql.DB, error) {
	query := url.Values{"_pragma": append(pragmas, "busy_timeout(5000)"), "_txlock": {"immediate"}}
	dsn := url.URL{Scheme: "file", Path: file, RawQuery: mode + "&" + query.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

// Close gives the directory up.
func (i *Inspection) Close() error {
	var errs []error
	if i.db != nil {
		errs = append(errs, i.db.Close())
	}
	if i.root != nil {
		errs = append(errs, i.root.Close())
	}
	if i.lock != nil {
		errs = append(errs, freeLock(i.lock))
	}
	return errors.Join(errs...)
}

// Dir is the data directory, absolute.
func (i *Inspection) Dir() string { return i.dir }

// Lose moves the file or directory name, relative to the data directory, into LostDir. One that is not there is no error.
func (i *Inspection) Lose(name string) error {
	_, err := lose(i.dir, name, "")
	return err
}

// lose moves name in the data directory dir to LostDir, under a new name that begins with prefix, which it returns.
func lose(dir, name, prefix string) (to string, err error) {
	from, lost := filepath.Join(dir, filepath.FromSlash(name)), filepath.Join(dir, LostDir)
	to = filepath.Join(lost, prefix+NewID("", 6)+"-"+filepath.Base(name))
	if err := os.MkdirAll(lost, 0o700); err != nil {
		return "", err
	}
	if err := os.Rename(from, to); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	return to, errors.Join(durable.SyncDir(lost), durable.SyncDir(dir), durable.SyncDir(filepath.Dir(from)))
}

// Remove removes the file or directory name, relative to the data directory, with all that is in it.
func (i *Inspection) Remove(name string) error { return i.root.RemoveAll(filepath.FromSlash(name)) }

// Exec changes rows. Its transaction is on disk when it returns nil.
func (i *Inspection) Exec(ctx context.Context, statement string, args ...any) (err error) {
	db, err := openSQLite(filepath.Join(i.dir, DatabaseFile), "mode=rw", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)")
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, statement, args...)
	return errors.Join(err, db.Close())
}

// Adapters returns the rows of all adapters, oldest first.
func (i *Inspection) Adapters(ctx context.Context) ([]Adapter, error) { return adapterRows(ctx, i.db) }

// JobStatuses returns the status of every job, by id.
func (i *Inspection) JobStatuses(ctx context.Context) (map[string]string, error) {
	rows, err := i.db.QueryContext(ctx, `SELECT id, status FROM jobs`)
	if err != nil {
		return nil, fmt.Errorf("list jobs: %w", err)
	}
	pairs, err := collect(rows, func(row interface{ Scan(...any) error }) (pair [2]string, err error) {
		err = row.Scan(&pair[0], &pair[1])
		return pair, err
	})
	statuses := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		statuses[pair[0]] = pair[1]
	}
	return statuses, err
}

// Final reports whether a job with this status never runs again.
func Final(status string) bool { return finalState(status) }

// Database examines the database itself. If it finds something, nothing else of the directory can be judged until that
// is repaired. It returns an error if the database belongs to a newer hone.
func (i *Inspection) Database(ctx context.Context) ([]Finding, error) {
	damaged := func(problem string) []Finding {
		return []Finding{{
			What: DatabaseFile, Problem: problem,
			Remedy: "copies every row that can be read into a new database; the old one goes to " + LostDir,
			Repair: i.salvage,
		}}
	}
	rows, err := i.db.QueryContext(ctx, `PRAGMA integrity_check(20)`)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return damaged(err.Error()), nil
	}
	said, err := collect(rows, scanText)
	if err != nil && ctx.Err() == nil {
		return damaged(err.Error()), nil
	}
	if err != nil {
		return nil, err
	}
	if len(said) != 1 || said[0] != "ok" {
		return damaged(strings.Join(said, "; ")), nil
	}
	var version int64
	if err := i.db.QueryRowContext(ctx, `SELECT max(version_id) FROM goose_db_version WHERE is_applied`).Scan(&version); err != nil {
		return damaged("its schema has no version: " + err.Error()), nil //nolint:nilerr // damage is a finding
	}
	newest, err := newestMigration()
	if err != nil {
		return nil, err
	}
	if version > newest {
		return nil, fmt.Errorf("the schema of %s has version %d and this hone knows up to %d: it was written by a newer hone; use that one", DatabaseFile, version, newest)
	}
	if err := checkSchema(ctx, i.db, version); errors.Is(err, errDamaged) {
		return damaged(err.Error()), nil
	} else if err != nil {
		return nil, err
	}
	return nil, nil
}

func scanText(row interface{ Scan(...any) error }) (string, error) {
	var s string
	err := row.Scan(&s)
	return s, err
}

func newestMigration() (int64, error) {
	files, err := fs.ReadDir(migrations, "migrations")
	if err != nil {
		return 0, err
	}
	var version int64
	_, err = fmt.Sscanf(files[len(files)-1].Name(), "%d_", &version)
	return version, err
}

// content is a row whose content is a blob.
type content struct {
	table, id string
	bytes     int64
}

// Blobs compares the blobs with the rows that name them, reading every byte, and looks for blobs and temporaries that
// nothing names.
func (i *Inspection) Blobs(ctx context.Context) ([]Finding, error) {
	named, err := i.contents(ctx)
	if err != nil {
		return nil, fmt.Errorf("rows with content: %w", err)
	}
	var findings []Finding
	there := map[string]bool{}
	err = fs.WalkDir(i.root.FS(), blobDir, func(name string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && name == blobDir {
			return nil
		}
		if err != nil || entry.IsDir() {
			return err
		}
		digest := entry.Name()
		rows := named[digest]
		switch want, err := blobPath(digest); {
		case err != nil || want != name:
			findings = append(findings, Finding{What: name, Problem: "it has not the name of a blob", Remedy: "move it away: no hone has put it there"})
			return nil //nolint:nilerr // it is a finding
		case len(rows) == 0 && i.salvaged:
			findings = append(findings, i.lost(nil, name, "no row names it; its row may have been in the part of the database that was damaged")...)
			return nil
		case len(rows) == 0:
			findings = append(findings, Finding{
				What: name, Problem: "no row names it", Leftover: true, Remedy: "removes it",
				Repair: func(context.Context) error { return i.Remove(name) },
			})
			return nil
		}
		there[digest] = true
		got, bytes, err := i.digest(ctx, name)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			findings = append(findings, i.lost(rows, name, fmt.Sprintf("its content cannot be read: %v", err))...)
		case got != digest:
			findings = append(findings, i.lost(rows, name, fmt.Sprintf("its content is damaged: sha256 %.12s, expected %.12s", got, digest))...)
		default:
			for _, row := range rows {
				if row.bytes != bytes {
					findings = append(findings, Finding{
						What: row.table + " " + row.id, Problem: fmt.Sprintf("its row says %d bytes, its content has %d and the right sha256", row.bytes, bytes),
						Remedy: "corrects the row",
						Repair: func(ctx context.Context) error {
							return i.Exec(ctx, `UPDATE `+row.table+` SET bytes = ? WHERE id = ?`, bytes, row.id)
						},
					})
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("blobs: %w", err)
	}
	for digest, rows := range named {
		if !there[digest] {
			findings = append(findings, i.lost(rows, "", "its content is missing")...)
		}
	}
	kept, err := fs.Glob(i.root.FS(), path.Join(LostDir, lostBlobs+"*"))
	if err != nil {
		return nil, fmt.Errorf("lost blobs: %w", err)
	}
	for _, name := range kept {
		findings = append(findings, Finding{
			What: name, Problem: "the database was lost, and this is what belonged to it: the contents of files are named by their sha256",
			Remedy: "stop the server and bring the old database back, or upload from here what is still needed; then remove it",
		})
	}
	temps, err := fs.ReadDir(i.root.FS(), tempDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("unfinished uploads: %w", err)
	}
	for _, temp := range temps {
		name := path.Join(tempDir, temp.Name())
		findings = append(findings, Finding{
			What: name, Problem: "an upload was cut off", Leftover: true, Remedy: "removes it",
			Repair: func(context.Context) error { return i.Remove(name) },
		})
	}
	return findings, nil
}

// contents returns the rows that name blobs, by digest: those of every table with a column sha256.
func (i *Inspection) contents(ctx context.Context) (map[string][]content, error) {
	rows, err := i.db.QueryContext(ctx, `SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c
		WHERE m.type = 'table' AND c.name = 'sha256' ORDER BY m.name`)
	if err != nil {
		return nil, err
	}
	tables, err := collect(rows, scanText)
	if err != nil {
		return nil, err
	}
	named := map[string][]content{}
	for _, table := range tables {
		rows, err := i.db.QueryContext(ctx, `SELECT id, bytes, sha256 FROM `+table+` ORDER BY seq`) // #nosec G202 -- a table of ours
		if err != nil {
			return nil, err
		}
		_, err = collect(rows, func(row interface{ Scan(...any) error }) (struct{}, error) {
			c, digest := content{table: table}, ""
			err := row.Scan(&c.id, &c.bytes, &digest)
			named[digest] = append(named[digest], c)
			return struct{}{}, err
		})
		if err != nil {
			return nil, err
		}
	}
	return named, nil
}

// lost is what is found for rows without content. blob is what is there in its stead, or "".
func (i *Inspection) lost(rows []content, blob, problem string) (findings []Finding) {
	for _, row := range rows {
		findings = append(findings, Finding{
			What: row.table + " " + row.id, Problem: problem,
			Remedy: "removes the row, and moves what is left of the content to " + LostDir + "; uploading the same content again, before that, mends it",
			Repair: func(ctx context.Context) error {
				if blob != "" {
					if err := i.Lose(blob); err != nil {
						return err
					}
				}
				return i.Exec(ctx, `DELETE FROM `+row.table+` WHERE id = ?`, row.id)
			},
		})
	}
	if len(rows) == 0 { // this may be the only copy of the content
		findings = append(findings, Finding{
			What: blob, Problem: problem, Remedy: "moves it to " + LostDir,
			Repair: func(context.Context) error { return i.Lose(blob) },
		})
	}
	return findings
}

// digest is the sha256 and the length of a file.
func (i *Inspection) digest(ctx context.Context, name string) (digest string, bytes int64, err error) {
	file, err := i.root.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer file.Close()
	hash := sha256.New()
	if bytes, err = io.Copy(hash, &contextReader{ctx: ctx, r: file}); err != nil {
		return "", 0, err
	}
	return hex.EncodeToString(hash.Sum(nil)), bytes, nil
}

// salvage puts a new database in the place of a damaged one, with the rows that can still be read.
func (i *Inspection) salvage(ctx context.Context) error {
	const temp = DatabaseFile + ".salvage"
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := i.Remove(temp + suffix); err != nil {
			return err
		}
	}
	to, err := openSQLite(filepath.Join(i.dir, temp), "mode=rwc", "synchronous(FULL)", "foreign_keys(1)")
	if err != nil {
		return err
	}
	if err := errors.Join(i.copyRows(ctx, to), to.Close(), i.db.Close()); err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	// The old database keeps its name until the new one takes it; its log must be gone by then.
	aside := filepath.Join(i.dir, LostDir, NewID("", 6)+"-")
	if err := os.MkdirAll(filepath.Dir(aside), 0o700); err != nil {
		return err
	}
	for _, name := range []string{DatabaseFile, DatabaseFile + "-wal"} {
		if err := os.Link(filepath.Join(i.dir, name), aside+name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := durable.SyncDir(filepath.Dir(aside)); err != nil {
		return err
	}
	if err := errors.Join(i.Remove(DatabaseFile+"-wal"), i.Remove(DatabaseFile+"-shm")); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(i.dir, temp), filepath.Join(i.dir, DatabaseFile)); err != nil {
		return err
	}
	i.salvaged = true
	return durable.SyncDir(i.dir)
}

// copyRows makes today's schema in to and fills it with the rows that can be read: each table from its beginning to the
// damage, and from its end back to it. Rows that break a rule of the schema stay behind.
func (i *Inspection) copyRows(ctx context.Context, to *sql.DB) error {
	if err := migrate(ctx, to); err != nil {
		return err
	}
	names := func(db *sql.DB) ([]string, error) {
		rows, err := db.QueryContext(ctx, `SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE 'goose_db_versio%' ORDER BY rowid`)
		if err != nil {
			return nil, err
		}
		return collect(rows, scanText)
	}
	tables, err := names(to)
	if err != nil {
		return err
	}
	sources, err := names(i.db)
	if err != nil || len(sources) != len(tables) { // otherwise they are the same ones, whatever their names are now
		sources = tables
	}
	tx, err := to.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	for n, table := range tables { // what a row refers to comes before it
		for _, order := range []string{"", " NOT INDEXED ORDER BY 1 DESC"} {
			if err := copyTable(ctx, i.db, tx, quoted(sources[n])+order, table); err != nil {
				return errors.Join(err, tx.Rollback())
			}
		}
	}
	return tx.Commit()
}

// quoted is a name of SQL. A damaged schema may hold any.
func quoted(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// copyTable copies rows until one cannot be read. An error is one of writing.
func copyTable(ctx context.Context, from *sql.DB, to *sql.Tx, source, table string) error {
	own, err := columnsOf(ctx, to, table)
	if err != nil {
		return err
	}
	// #nosec G202 -- a quoted name
	rows, err := from.QueryContext(ctx, `SELECT * FROM `+source) //nolint:rowserrcheck // what cannot be read is left behind
	if err != nil {
		return context.Cause(ctx)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return context.Cause(ctx)
	}
	values, into := make([]any, len(columns)), make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	if len(columns) == len(own) { // a damaged schema may give them other names
		columns = own
	}
	for i, column := range columns {
		columns[i] = quoted(column)
	}
	// #nosec G202 -- a table of ours, and quoted names
	insert := `INSERT OR IGNORE INTO ` + table + ` (` + strings.Join(columns, ", ") + `) VALUES (?` + strings.Repeat(", ?", len(columns)-1) + `)`
	for rows.Next() && rows.Scan(into...) == nil {
		if _, err := to.ExecContext(ctx, insert, values...); err != nil && !hasCode(err, sqliteConstraint, sqliteMismatch) {
			return err
		}
	}
	return context.Cause(ctx)
}

// columnsOf are the columns of a table of ours, in their order.
func columnsOf(ctx context.Context, tx *sql.Tx, table string) ([]string, error) {
	rows, err := tx.QueryContext(ctx, `SELECT name FROM pragma_table_info(?) ORDER BY cid`, table)
	if err != nil {
		return nil, err
	}
	return collect(rows, scanText)
}

// hasCode reports whether err is SQLite's with one of these primary result codes.
func hasCode(err error, codes ...int) bool {
	var coded interface{ Code() int }
	return errors.As(err, &coded) && slices.Contains(codes, coded.Code()&0xff)
}

// Primary result codes of SQLite.
const (
	sqliteCorrupt    = 11
	sqliteConstraint = 19
	sqliteMismatch   = 20
	sqliteNotADB     = 26
)
