// Package store owns the server's durable state: one SQLite database for what is listed and counted, and a directory of
// content-addressed blobs for what was uploaded. It also owns the lock that keeps a second server out of the directory.
//
//	st, err := store.Open(ctx, home, store.Options{})
//	defer st.Close()
//	file, err := st.CreateFile(ctx, "train.jsonl", "fine-tune", upload)
//
// A write that returned nil is on disk: the database syncs every commit, and a blob is synced before its row exists.
// All methods may be called from any goroutine.
package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite" // registers the driver "sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

//go:embed migrations/*.sql
var migrations embed.FS

var (
	// ErrNotFound is returned for an id that has no row.
	ErrNotFound = errors.New("not found")
	// ErrStale is returned for a write of an attempt that no longer owns its job, or to a job whose state is final.
	ErrStale = errors.New("the job has another attempt or a final state")
)

// Options of Open. The zero value is usable.
type Options struct {
	Logger *slog.Logger     // default: discards
	Now    func() time.Time // default: time.Now
}

// Store is an open data directory.
type Store struct {
	dir    string
	root   *os.Root // every blob path goes through it, so that no name can leave dir
	lock   *os.File
	writer *sql.DB // one connection: SQLite has one writer, and waiting in Go is fair
	reader *sql.DB
	logger *slog.Logger
	now    func() time.Time

	// blobs orders putting a blob and its row against removing the last row and its blob.
	blobs sync.Mutex
	// damaged has what is wrong with the blob of a digest, as far as that was seen.
	damaged sync.Map

	closeOnce sync.Once
	closeErr  error
}

// Open takes the directory dir, creating it if needed, brings its database up to date and removes what an earlier
// server left half-written. It returns *InUseError if another process has the directory open.
func Open(ctx context.Context, dir string, opts Options) (_ *Store, err error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, unusable(dir, err)
	}
	s := &Store{dir: dir, logger: opts.Logger, now: opts.Now}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.lock, err = takeLock(dir); err != nil {
		return nil, err
	}
	if s.root, err = os.OpenRoot(dir); err != nil {
		return nil, unusable(dir, err)
	}
	if err := s.root.MkdirAll(tempDir, 0o700); err != nil {
		return nil, unusable(dir, err)
	}
	if err := s.keepLost(); err != nil {
		return nil, fmt.Errorf("keep what a lost database has left in %s: %w", dir, err)
	}
	if err := s.openDatabase(ctx); err != nil {
		if hasCode(err, sqliteCorrupt, sqliteNotADB) || errors.Is(err, errDamaged) {
			err = fmt.Errorf("%w; the database is damaged: hone fsck --repair saves what can be read of it", err)
		}
		return nil, fmt.Errorf("database %s: %w", filepath.Join(dir, DatabaseFile), err)
	}
	if err := s.sweep(ctx); err != nil {
		return nil, fmt.Errorf("clean up %s: %w", dir, err)
	}
	if err := s.Expire(ctx); err != nil {
		return nil, fmt.Errorf("clean up %s: %w", dir, err)
	}
	return s, nil
}

// DatabaseFile is the name of the database in a data directory.
const DatabaseFile = "hone.db"

func (s *Store) openDatabase(ctx context.Context) error {
	open := func(conns int, pragmas ...string) (*sql.DB, error) {
		query := url.Values{"_pragma": pragmas, "_txlock": {"immediate"}}
		dsn := url.URL{Scheme: "file", Path: filepath.Join(s.dir, DatabaseFile), RawQuery: query.Encode()}
		db, err := sql.Open("sqlite", dsn.String())
		if err != nil {
			return nil, err
		}
		db.SetMaxOpenConns(conns)
		db.SetMaxIdleConns(conns)
		return db, nil
	}
	var err error
	s.writer, err = open(1, "busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)")
	if err != nil {
		return err
	}
	if err := quickCheck(ctx, s.writer); err != nil {
		return err
	}
	if err := migrate(ctx, s.writer); err != nil {
		return err
	}
	s.reader, err = open(4, "busy_timeout(5000)", "query_only(1)")
	return err
}

// errDamaged says that a database's pages contradict each other, or its schema the migrations.
var errDamaged = errors.New("damaged")

// quickCheck reads every page, milliseconds for the megabytes that a database has: writing into a damaged one damages more.
func quickCheck(ctx context.Context, db *sql.DB) error {
	var said string
	if err := db.QueryRowContext(ctx, `PRAGMA quick_check(1)`).Scan(&said); err != nil {
		return err
	}
	if said != "ok" {
		return fmt.Errorf("%w: %s", errDamaged, said)
	}
	return nil
}

func migrationsOf(db *sql.DB) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(goose.DialectSQLite3, db, files, goose.WithDisableGlobalRegistry(true))
}

// checkSchema returns an error that is errDamaged if the schema of db, of the version given, is not what the migrations make:
// SQLite does not see that a letter of a column's name or of a CHECK has become another.
func checkSchema(ctx context.Context, db *sql.DB, version int64) error {
	fresh, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return err
	}
	defer fresh.Close()
	fresh.SetMaxOpenConns(1) // each has a memory of its own
	if version > 0 {
		provider, err := migrationsOf(fresh)
		if err != nil {
			return err
		}
		if _, err := provider.UpTo(ctx, version); err != nil {
			return err
		}
	}
	var schemas [2][]string
	for i, db := range []*sql.DB{fresh, db} {
		rows, err := db.QueryContext(ctx, `SELECT type || ' ' || name || ' of ' || tbl_name || ': ' || sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' AND tbl_name <> 'goose_db_version'`)
		if err != nil {
			return err
		}
		if schemas[i], err = collect(rows, scanText); err != nil {
			return err
		}
	}
	for _, want := range schemas[0] {
		if !slices.Contains(schemas[1], want) {
			return fmt.Errorf("%w: its schema lacks the %s", errDamaged, want)
		}
	}
	if version == 0 && len(schemas[1]) > 0 {
		return fmt.Errorf("%w: its schema has no version", errDamaged)
	}
	return nil
}

// migrate brings a database to today's schema. An error of a migration leaves the one before it.
func migrate(ctx context.Context, db *sql.DB) error {
	provider, err := migrationsOf(db)
	if err != nil {
		return err
	}
	current, target, err := provider.GetVersions(ctx)
	if err != nil {
		return err
	}
	if current > target {
		return fmt.Errorf("its schema has version %d and this hone knows up to %d: it was written by a newer hone; use that one", current, target)
	}
	if err := checkSchema(ctx, db, current); err != nil {
		return err
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

// Close closes the database and gives the directory up. It is idempotent.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		var errs []error
		// The writer last: it is the one that can checkpoint the log into the database.
		if s.reader != nil {
			errs = append(errs, s.reader.Close())
		}
		if s.writer != nil {
			errs = append(errs, s.writer.Close())
		}
		if s.root != nil {
			errs = append(errs, s.root.Close())
		}
		if s.lock != nil {
			errs = append(errs, freeLock(s.lock))
		}
		s.closeErr = errors.Join(errs...)
	})
	return s.closeErr
}

// Dir is the data directory, absolute.
func (s *Store) Dir() string { return s.dir }

// Ping answers nil if the database can be read, for health checks.
func (s *Store) Ping(ctx context.Context) error {
	var one int
	return s.reader.QueryRowContext(ctx, `SELECT 1`).Scan(&one)
}

// write runs do in one transaction of the writer. The transaction is on disk when write returns nil. SQLite's word for a
// full disk is joined by the system's, syscall.ENOSPC, which callers look for.
func (s *Store) write(ctx context.Context, do func(tx *sql.Tx) error) error {
	err := s.transact(ctx, do)
	if full := new(sqlite.Error); errors.As(err, &full) && full.Code()&0xff == sqlite3.SQLITE_FULL {
		return fmt.Errorf("%w: %w", syscall.ENOSPC, err)
	}
	return err
}

func (s *Store) transact(ctx context.Context, do func(tx *sql.Tx) error) error {
	tx, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if err := do(tx); err != nil {
		if rollback := tx.Rollback(); rollback != nil && !errors.Is(rollback, sql.ErrTxDone) {
			err = errors.Join(err, fmt.Errorf("roll back: %w", rollback))
		}
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// cursor turns the after cursor of a listing into a comparison of seq. An unknown cursor is ErrNotFound.
func (s *Store) cursor(ctx context.Context, table, after string) (int64, error) {
	var seq int64
	err := s.reader.QueryRowContext(ctx, `SELECT seq FROM `+table+` WHERE id = ?`, after).Scan(&seq)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, fmt.Errorf("after %q: %w", after, ErrNotFound)
	}
	return seq, err
}

// NewID returns prefix followed by n random characters of a-z and 2-7, 5 bits each; n is at most 26.
func NewID(prefix string, n int) string {
	return prefix + strings.ToLower(rand.Text())[:n]
}

// idLength is that of the ids in the API, without their prefix: 120 random bits.
const idLength = 24

// NewJobID returns a new ftjob-... id.
func NewJobID() string { return NewID("ftjob-", idLength) }

// unusable says what to do about a data directory that cannot be written.
func unusable(dir string, err error) error {
	return fmt.Errorf("data directory %s cannot be used: %w; make it writable, or set HONE_HOME or --data-dir to another", dir, err)
}
