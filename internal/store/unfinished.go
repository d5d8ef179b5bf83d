package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
)

// UnfinishedJobs returns the ids of the unfinished jobs of a base model, oldest first, in a data directory that another process
// may have open: it only reads. A directory without a database has none.
func UnfinishedJobs(ctx context.Context, dir, model string) (ids []string, err error) {
	path := filepath.Join(dir, DatabaseFile)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{"_pragma": {"busy_timeout(5000)", "query_only(1)"}}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("unfinished jobs of %q: %w", model, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	rows, err := db.QueryContext(ctx, `SELECT id FROM jobs WHERE model = ? AND status NOT IN ('succeeded', 'failed', 'cancelled') ORDER BY seq`, model)
	if err == nil {
		ids, err = collect(rows, func(row interface{ Scan(...any) error }) (string, error) {
			var id string
			err := row.Scan(&id)
			return id, err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("unfinished jobs of %q: %w", model, err)
	}
	return ids, nil
}
