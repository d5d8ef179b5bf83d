package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Batch is a batch's row. What its states mean is for package batch to say. Times are Unix seconds, 0 for what has not happened.
type Batch struct {
	ID             string // batch_...
	CreatedAt      int64
	Status         string
	Endpoint       string
	InputFile      string
	Window         string            // completion_window
	Metadata       map[string]string // nil: none was sent
	OutputLifetime time.Duration     // of the output files; 0: for ever
	Model          string            // of the first request
	Errors         []BatchError      // of the input file
	OutputFile     string
	ErrorFile      string
	Total          int // requests
	Completed      int
	Failed         int
	Usage          BatchUsage
	InProgressAt   int64
	ExpiresAt      int64
	FinalizingAt   int64
	CompletedAt    int64
	FailedAt       int64
	ExpiredAt      int64
	CancellingAt   int64
	CancelledAt    int64
}

// BatchError says what is wrong with a batch's input file.
type BatchError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Param   string `json:"param,omitempty"` // the field of the line
	Line    int    `json:"line,omitempty"`  // from 1; 0: of the whole file
}

// BatchUsage are the tokens of a batch's answers.
type BatchUsage struct {
	PromptTokens     int64 `json:"prompt_tokens"`
	CachedTokens     int64 `json:"cached_tokens"`
	CompletionTokens int64 `json:"completion_tokens"`
	ReasoningTokens  int64 `json:"reasoning_tokens"`
}

// BatchAnswer is a line of a batch's output or error file.
type BatchAnswer struct {
	Line    int  // of its request in the input file, from 1
	Failed  bool // belongs into the error file
	Content []byte
	Usage   BatchUsage
}

// unfinishedBatch are the states in which a batch still reads its input file.
const unfinishedBatch = `('validating', 'in_progress', 'finalizing', 'cancelling')`

func finalBatch(status string) bool { return !strings.Contains(unfinishedBatch, "'"+status+"'") }

const batchColumns = `id, created_at, status, endpoint, input_file, window, metadata, output_lifetime, model, errors, output_file, error_file,
	total, completed, failed, usage, in_progress_at, expires_at, finalizing_at, completed_at, failed_at, expired_at, cancelling_at, cancelled_at`

// batchValues are the placeholders of batchColumns.
var batchValues = "?" + strings.Repeat(", ?", strings.Count(batchColumns, ","))

func scanBatch(row interface{ Scan(...any) error }) (Batch, error) {
	var b Batch
	var metadata, list, usage string
	var lifetime int64
	err := row.Scan(&b.ID, &b.CreatedAt, &b.Status, &b.Endpoint, &b.InputFile, &b.Window, &metadata, &lifetime, &b.Model, &list, &b.OutputFile, &b.ErrorFile,
		&b.Total, &b.Completed, &b.Failed, &usage, &b.InProgressAt, &b.ExpiresAt, &b.FinalizingAt, &b.CompletedAt, &b.FailedAt, &b.ExpiredAt, &b.CancellingAt, &b.CancelledAt)
	if err != nil {
		return Batch{}, err
	}
	b.OutputLifetime = time.Duration(lifetime) * time.Second
	for _, column := range []struct {
		text string
		dst  any
	}{{metadata, &b.Metadata}, {list, &b.Errors}, {usage, &b.Usage}} {
		if column.text == "" {
			continue
		}
		if err := json.Unmarshal([]byte(column.text), column.dst); err != nil {
			return Batch{}, fmt.Errorf("batch %s: %w", b.ID, err)
		}
	}
	return b, nil
}

// values are the columns of batchColumns, in that order.
func (b *Batch) values() ([]any, error) {
	var metadata, list []byte
	usage, err := json.Marshal(b.Usage)
	if err == nil && b.Metadata != nil {
		metadata, err = json.Marshal(b.Metadata)
	}
	if err == nil && b.Errors != nil {
		list, err = json.Marshal(b.Errors)
	}
	return []any{
		b.ID, b.CreatedAt, b.Status, b.Endpoint, b.InputFile, b.Window, string(metadata), int64(b.OutputLifetime / time.Second), b.Model, string(list), b.OutputFile, b.ErrorFile,
		b.Total, b.Completed, b.Failed, string(usage), b.InProgressAt, b.ExpiresAt, b.FinalizingAt, b.CompletedAt, b.FailedAt, b.ExpiredAt, b.CancellingAt, b.CancelledAt,
	}, err
}

// NewBatchID returns a new batch_... id.
func NewBatchID() string { return NewID("batch_", idLength) }

// CreateBatch adds the batch. Its input file must exist, so that it cannot be deleted between the caller's look and this
// write; otherwise it returns ErrNotFound.
func (s *Store) CreateBatch(ctx context.Context, b Batch) error {
	values, err := b.values()
	if err != nil {
		return fmt.Errorf("create batch %s: %w", b.ID, err)
	}
	err = s.write(ctx, func(tx *sql.Tx) error {
		var n int
		if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM files WHERE id = ?`, b.InputFile).Scan(&n); err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("file %q: %w", b.InputFile, ErrNotFound)
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO batches (`+batchColumns+`) VALUES (`+batchValues+`)`, values...) // #nosec G202 -- constants
		if err != nil {
			return err
		}
		return s.keep(ctx, tx, b.ID)
	})
	if err != nil {
		return fmt.Errorf("create batch %s: %w", b.ID, err)
	}
	return nil
}

// Batch returns the batch with this id, or ErrNotFound.
func (s *Store) Batch(ctx context.Context, id string) (Batch, error) {
	b, err := readBatch(ctx, s.reader, id)
	if err != nil {
		return Batch{}, fmt.Errorf("batch %q: %w", id, err)
	}
	return b, nil
}

func readBatch(ctx context.Context, from querier, id string) (Batch, error) {
	b, err := scanBatch(from.QueryRowContext(ctx, `SELECT `+batchColumns+` FROM batches WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	return b, err
}

// Batches returns a page of batches, newest first, and whether there are more. after is the id that the page before ended
// with, or "" for the first page; ErrNotFound if there is no such batch.
func (s *Store) Batches(ctx context.Context, after string, limit int) (batches []Batch, more bool, err error) {
	query, args := `SELECT `+batchColumns+` FROM batches`, []any{}
	if after != "" {
		seq, err := s.cursor(ctx, "batches", after)
		if err != nil {
			return nil, false, fmt.Errorf("list batches: %w", err)
		}
		query, args = query+` WHERE seq < ?`, append(args, seq)
	}
	rows, err := s.reader.QueryContext(ctx, query+` ORDER BY seq DESC LIMIT ?`, append(args, limit+1)...)
	if err == nil {
		batches, err = collect(rows, scanBatch)
	}
	if err != nil {
		return nil, false, fmt.Errorf("list batches: %w", err)
	}
	batches, more = cut(batches, limit)
	return batches, more, nil
}

// NextBatch returns the oldest batch with one of these states, or ErrNotFound.
func (s *Store) NextBatch(ctx context.Context, states ...string) (Batch, error) {
	args := make([]any, len(states))
	for i, status := range states {
		args[i] = status
	}
	b, err := scanBatch(s.reader.QueryRowContext(ctx, `SELECT `+batchColumns+` FROM batches
		WHERE status IN (?`+strings.Repeat(", ?", len(states)-1)+`) ORDER BY seq LIMIT 1`, args...))
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return Batch{}, fmt.Errorf("next batch: %w", err)
	}
	return b, nil
}

// UpdateBatch changes a batch's row, unless its state is final: then it returns ErrStale. An error of change undoes
// everything and is returned.
func (s *Store) UpdateBatch(ctx context.Context, id string, change func(b *Batch) error) (b Batch, err error) {
	err = s.write(ctx, func(tx *sql.Tx) error {
		b, err = updateBatch(ctx, tx, id, change)
		return err
	})
	if err != nil {
		return Batch{}, fmt.Errorf("update batch %q: %w", id, err)
	}
	return b, nil
}

func updateBatch(ctx context.Context, tx *sql.Tx, id string, change func(b *Batch) error) (Batch, error) {
	b, err := readBatch(ctx, tx, id)
	if err != nil {
		return b, err
	}
	if finalBatch(b.Status) {
		return b, fmt.Errorf("the batch is %s: %w", b.Status, ErrStale)
	}
	if err := change(&b); err != nil {
		return b, err
	}
	values, err := b.values()
	if err != nil {
		return b, err
	}
	_, err = tx.ExecContext(ctx, `UPDATE batches SET (`+batchColumns+`) = (`+batchValues+`) WHERE id = ?`, append(values, id)...) // #nosec G202 -- constants
	return b, err
}

// PutBatchAnswer writes an answer into the journal and counts it. A second answer to the same line changes nothing, and one to
// a batch that does not run any more is ErrStale.
func (s *Store) PutBatchAnswer(ctx context.Context, id string, a BatchAnswer) error {
	err := s.write(ctx, func(tx *sql.Tx) error {
		_, err := updateBatch(ctx, tx, id, func(b *Batch) error {
			if b.Status != "in_progress" && b.Status != "cancelling" {
				return fmt.Errorf("the batch is %s: %w", b.Status, ErrStale)
			}
			result, err := tx.ExecContext(ctx, `INSERT INTO batch_answers (batch_id, line, failed, content) VALUES (?, ?, ?, ?)
				ON CONFLICT DO NOTHING`, id, a.Line, a.Failed, string(a.Content))
			if err != nil {
				return err
			}
			if n, err := result.RowsAffected(); err != nil || n == 0 {
				return err
			}
			if a.Failed {
				b.Failed++
			} else {
				b.Completed++
			}
			b.Usage.PromptTokens += a.Usage.PromptTokens
			b.Usage.CachedTokens += a.Usage.CachedTokens
			b.Usage.CompletionTokens += a.Usage.CompletionTokens
			b.Usage.ReasoningTokens += a.Usage.ReasoningTokens
			return nil
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("answer to line %d of batch %q: %w", a.Line, id, err)
	}
	return nil
}

// AnsweredLines are the lines of the batch's input file that have an answer in the journal.
func (s *Store) AnsweredLines(ctx context.Context, id string) (map[int]bool, error) {
	rows, err := s.reader.QueryContext(ctx, `SELECT line FROM batch_answers WHERE batch_id = ?`, id)
	if err != nil {
		return nil, fmt.Errorf("journal of batch %q: %w", id, err)
	}
	lines, err := collect(rows, func(row interface{ Scan(...any) error }) (line int, err error) {
		err = row.Scan(&line)
		return line, err
	})
	if err != nil {
		return nil, fmt.Errorf("journal of batch %q: %w", id, err)
	}
	answered := make(map[int]bool, len(lines))
	for _, line := range lines {
		answered[line] = true
	}
	return answered, nil
}

// journalReader reads the answers of one kind, in the order of their lines, each with a newline. Rows are asked for one after
// the other, so that no transaction is held while the file is written.
type journalReader struct {
	ctx    context.Context
	store  *Store
	id     string
	failed bool
	line   int // that was read last
	rest   []byte
}

func (r *journalReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		var content string
		err := r.store.reader.QueryRowContext(r.ctx, `SELECT line, content FROM batch_answers WHERE batch_id = ? AND failed = ? AND line > ?
			ORDER BY line LIMIT 1`, r.id, r.failed, r.line).Scan(&r.line, &content)
		if errors.Is(err, sql.ErrNoRows) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
		r.rest = append([]byte(content), '\n')
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// FinishBatch makes the output and error files of what is in the journal and of rest, the lines of requests that have no
// answer, changes the row and drops the journal, in one transaction. A file that would be empty is not made. Of change, see
// UpdateBatch; it is told the ids of the files in the row.
func (s *Store) FinishBatch(ctx context.Context, id string, rest []byte, change func(b *Batch) error) (Batch, error) {
	b, err := s.finishBatch(ctx, id, rest, change)
	if err != nil {
		return Batch{}, fmt.Errorf("finish batch %q: %w", id, err)
	}
	return b, nil
}

func (s *Store) finishBatch(ctx context.Context, id string, rest []byte, change func(b *Batch) error) (b Batch, err error) {
	if b, err = readBatch(ctx, s.reader, id); err != nil {
		return b, err
	}
	var staged []*Staged
	var files []File
	defer func() {
		for _, blob := range staged {
			err = errors.Join(err, s.Discard(blob)) // those that did not become blobs
		}
	}()
	for _, kind := range []struct {
		failed bool
		name   string
		rest   []byte
	}{{false, "output", nil}, {true, "error", rest}} {
		r := io.MultiReader(&journalReader{ctx: ctx, store: s, id: id, failed: kind.failed}, bytes.NewReader(kind.rest))
		blob, err := s.Stage(ctx, r)
		if err != nil {
			return b, err
		}
		staged = append(staged, blob)
		file := s.newFile(blob, NewFile{Filename: id + "_" + kind.name + ".jsonl", Purpose: "batch_output", Lifetime: b.OutputLifetime})
		if files = append(files, file); blob.bytes == 0 {
			files[len(files)-1].ID = ""
		}
	}
	s.blobs.Lock()
	defer s.blobs.Unlock()
	for i, file := range files {
		if file.ID == "" {
			continue
		}
		if err := s.publish(*staged[i]); err != nil {
			return b, err
		}
	}
	err = s.write(ctx, func(tx *sql.Tx) error {
		b, err = updateBatch(ctx, tx, id, func(b *Batch) error {
			b.OutputFile, b.ErrorFile = files[0].ID, files[1].ID
			return change(b)
		})
		if err != nil {
			return err
		}
		for _, file := range files {
			if file.ID == "" {
				continue
			}
			if err := insertFile(ctx, tx, file); err != nil {
				return err
			}
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM batch_answers WHERE batch_id = ?`, id)
		return err
	})
	return b, err
}
