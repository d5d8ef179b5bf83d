// Package batch answers the requests of an uploaded file, one by one, behind those of users.
//
//	b := batch.New(batch.Options{Store: st})
//	b.Start(server)
//	row, err := b.Create(ctx, batch.Spec{InputFile: "file-...", Endpoint: "/v1/chat/completions", Window: "24h"})
//
// A batch's row is the truth, and its states are OpenAI's:
//
//	validating ──► in_progress ──► finalizing ──► completed
//	    │  │           │   │            │
//	    │  │           │   └─ 24 h ─────┴─► (finalizing) ─► expired
//	    │  └───────────┴──── Cancel ─► cancelling ─► cancelled
//	    └─ errors of the file, each with its line ─► failed
//
// Batches are validated as they come, and answered one after the other, the oldest first. Every answer is written into the journal
// (store.PutBatchAnswer) before it counts; a server that was killed reads the journal and asks for what is missing. The end of
// a batch, its files and the drop of its journal are one transaction. So each custom_id stands in one of the two files exactly once:
// in the output file with an answer of status 200, in the error file with another, or with the reason why it was not asked.
package batch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/store"
)

// States of a batch. The last four are final.
const (
	Validating = "validating"
	InProgress = "in_progress"
	Finalizing = "finalizing"
	Cancelling = "cancelling"
	Completed  = "completed"
	Failed     = "failed"
	Expired    = "expired"
	Cancelled  = "cancelled"
)

// Limits of a batch, which are OpenAI's but for the length of a line.
const (
	maxRequests   = 50_000
	maxInputBytes = 200 << 20
	maxLineBytes  = 32 << 20
	maxErrors     = 50 // that are reported of a file
)

// Window is the only completion_window, and its length.
const (
	Window         = "24h"
	windowDuration = 24 * time.Hour
)

// Endpoints are the paths that the requests of a batch may have.
func Endpoints() []string {
	return []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}
}

// Purpose is that of input files.
const Purpose = "batch"

// Answer is what the API answers a request with.
type Answer struct {
	Status     int
	RequestID  string
	RetryAfter time.Duration // that the server asks for; 0: it does not
	Body       []byte        // JSON
}

// API answers requests in process; server.Server implements it.
type API interface {
	// Answer does what POST path with this body does, without what guards the API's door. It returns early when ctx ends.
	Answer(ctx context.Context, path string, body []byte) Answer
	// Busy reports whether a model computes for a user.
	Busy() bool
}

// Options of New. Store is required.
type Options struct {
	Store    *store.Store
	InFlight int              // requests that are computed at a time; 0: 4
	Logger   *slog.Logger     // nil drops the log
	Now      func() time.Time // nil: time.Now
}

// Batches are all batches of a data directory. It is used once: New, Start, Stop. It is safe for concurrent use.
type Batches struct {
	opts   Options
	api    API
	ctx    context.Context // of the work
	cancel context.CancelFunc
	work   sync.WaitGroup
	wake   chan struct{} // of the loop that validates
	ready  chan struct{} // of the loop that answers

	mu      sync.Mutex
	running string // the batch that is answered
	stop    context.CancelCauseFunc
}

// New returns Batches that have not started.
func New(opts Options) *Batches {
	if opts.InFlight <= 0 {
		opts.InFlight = 4
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	b := &Batches{opts: opts, wake: make(chan struct{}, 1), ready: make(chan struct{}, 1)}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// Start asks api for the answers to the batches, first of all to those that an earlier server left.
func (b *Batches) Start(api API) {
	b.api = api
	b.work.Go(func() { b.loop(b.wake, b.validateNext) })
	b.work.Go(func() { b.loop(b.ready, b.answerNext) })
}

// Stop breaks off what is computed and returns when nothing of it goes on. The next Start goes on with it. It may be called
// twice, and before Start.
func (b *Batches) Stop() {
	b.cancel()
	b.work.Wait()
}

// InvalidError refuses a Spec.
type InvalidError struct {
	Param   string // the field to blame
	Message string
}

func (e *InvalidError) Error() string { return e.Message }

func invalid(param, format string, args ...any) *InvalidError {
	return &InvalidError{Param: param, Message: fmt.Sprintf(format, args...)}
}

// ConflictError refuses a change that the batch's state does not allow.
type ConflictError struct{ Message string }

func (e *ConflictError) Error() string { return e.Message }

// Spec is what Create is asked for.
type Spec struct {
	InputFile      string
	Endpoint       string
	Window         string
	Metadata       map[string]string // at most 16 pairs, keys to 64 and values to 512 characters
	OutputLifetime time.Duration     // of the output files; 0: for ever
}

// Create makes a batch, which is validated and answered later. It returns an *InvalidError.
func (b *Batches) Create(ctx context.Context, spec Spec) (store.Batch, error) {
	switch {
	case !slices.Contains(Endpoints(), spec.Endpoint):
		return store.Batch{}, invalid("endpoint", "endpoint is %.60q, expected one of %s", spec.Endpoint, strings.Join(Endpoints(), ", "))
	case spec.Window != Window:
		return store.Batch{}, invalid("completion_window", "completion_window is %.20q, expected %s", spec.Window, Window)
	case len(spec.Metadata) > 16:
		return store.Batch{}, invalid("metadata", "metadata has %d pairs; at most 16 are allowed", len(spec.Metadata))
	}
	for key, value := range spec.Metadata {
		if utf8.RuneCountInString(key) > 64 || utf8.RuneCountInString(value) > 512 {
			return store.Batch{}, invalid("metadata", "metadata %.70q: a key has at most 64 characters and a value 512", key)
		}
	}
	file, err := b.opts.Store.File(ctx, spec.InputFile)
	if err == nil && file.Purpose != Purpose {
		return store.Batch{}, invalid("input_file_id", "the file %s has the purpose %s; upload it with the purpose %s", file.ID, file.Purpose, Purpose)
	}
	now := b.opts.Now()
	row := store.Batch{
		ID: store.NewBatchID(), CreatedAt: now.Unix(), Status: Validating, Endpoint: spec.Endpoint, InputFile: spec.InputFile, Window: spec.Window,
		Metadata: spec.Metadata, OutputLifetime: spec.OutputLifetime, ExpiresAt: now.Add(windowDuration).Unix(),
	}
	if err == nil {
		err = b.opts.Store.CreateBatch(ctx, row)
	}
	if errors.Is(err, store.ErrNotFound) {
		return store.Batch{}, invalid("input_file_id", "the file %.60q does not exist", spec.InputFile)
	}
	if err != nil {
		return store.Batch{}, err
	}
	b.opts.Logger.Info("batch created", "batch_id", row.ID, "file_id", row.InputFile)
	wake(b.wake)
	return row, nil
}

// Get returns the batch with this id, or store.ErrNotFound.
func (b *Batches) Get(ctx context.Context, id string) (store.Batch, error) {
	return b.opts.Store.Batch(ctx, id)
}

// List returns a page of batches, newest first; see store.Batches.
func (b *Batches) List(ctx context.Context, after string, limit int) (batches []store.Batch, more bool, err error) {
	return b.opts.Store.Batches(ctx, after, limit)
}

// Cancel lets a batch end with the answers that it has. It returns store.ErrNotFound, or a *ConflictError if the batch ends
// already. The batch is cancelling then, and cancelled soon.
func (b *Batches) Cancel(ctx context.Context, id string) (store.Batch, error) {
	row, err := b.opts.Store.UpdateBatch(ctx, id, func(row *store.Batch) error {
		switch row.Status {
		case Cancelling:
			return nil
		case Finalizing:
			return &ConflictError{Message: fmt.Sprintf("the batch %s is %s: all of its requests are answered", id, row.Status)}
		}
		row.Status, row.CancellingAt = Cancelling, b.opts.Now().Unix()
		return nil
	})
	if errors.Is(err, store.ErrStale) {
		if row, err = b.Get(ctx, id); err == nil {
			err = &ConflictError{Message: fmt.Sprintf("the batch %s is %s", id, row.Status)}
		}
	}
	if err != nil {
		return store.Batch{}, err
	}
	b.mu.Lock()
	if b.running == id {
		b.stop(errCancelled)
	}
	b.mu.Unlock()
	wake(b.ready)
	return row, nil
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// retryDelay is how long the loops wait after an error of the state: a full disk, say.
const retryDelay = 5 * time.Second

// loop calls next again and again: at once while there is work, and else when it is woken.
func (b *Batches) loop(woken <-chan struct{}, next func(ctx context.Context) error) {
	for b.ctx.Err() == nil {
		err := next(b.ctx)
		switch {
		case err == nil:
			continue
		case errors.Is(err, store.ErrNotFound): // nothing to do
			select {
			case <-woken:
			case <-b.ctx.Done():
			}
			continue
		case b.ctx.Err() != nil:
			return
		}
		b.opts.Logger.Error("a batch does not get on; it is tried again", "error", err, "in", retryDelay)
		select {
		case <-time.After(retryDelay):
		case <-b.ctx.Done():
		}
	}
}

// fail ends a batch whose input cannot be read or used.
func (b *Batches) fail(ctx context.Context, id string, reasons ...store.BatchError) error {
	row, err := b.opts.Store.FinishBatch(ctx, id, nil, func(row *store.Batch) error {
		row.Status, row.FailedAt, row.Errors = Failed, b.opts.Now().Unix(), reasons
		return nil
	})
	if errors.Is(err, store.ErrStale) {
		return nil
	}
	if err == nil {
		b.opts.Logger.Info("batch failed", "batch_id", row.ID, "errors", len(reasons), "first", reasons[0].Message)
	}
	return err
}

// validateNext validates the oldest batch that waits for it.
func (b *Batches) validateNext(ctx context.Context) error {
	row, err := b.opts.Store.NextBatch(ctx, Validating)
	if err != nil {
		return err
	}
	file, content, err := b.opts.Store.OpenFile(ctx, row.InputFile)
	if err != nil {
		return b.unreadable(ctx, row, err)
	}
	defer content.Close()
	var found checked
	if file.Bytes > maxInputBytes {
		found.add(0, "", "file_too_large", "the file has %d bytes; at most %d MiB are allowed", file.Bytes, maxInputBytes>>20)
	} else if found, err = check(ctx, content, row.Endpoint); err != nil {
		return fmt.Errorf("validate batch %s: %w", row.ID, err)
	}
	if len(found.errors) > 0 {
		return b.fail(ctx, row.ID, found.errors...)
	}
	_, err = b.opts.Store.UpdateBatch(ctx, row.ID, func(row *store.Batch) error {
		row.Total, row.Model = found.requests, found.model
		if row.Status == Validating { // and not cancelled meanwhile
			row.Status, row.InProgressAt = InProgress, b.opts.Now().Unix()
		}
		return nil
	})
	wake(b.ready)
	if errors.Is(err, store.ErrStale) {
		return nil
	}
	return err
}

// unreadable ends a batch whose input file is gone or damaged, and passes on other errors.
func (b *Batches) unreadable(ctx context.Context, row store.Batch, err error) error {
	if errors.Is(err, store.ErrNotFound) || isNotExist(err) {
		return b.fail(ctx, row.ID, store.BatchError{Code: "input_file_missing", Message: fmt.Sprintf("the file %s cannot be read any more", row.InputFile)})
	}
	return fmt.Errorf("input file of batch %s: %w", row.ID, err)
}
