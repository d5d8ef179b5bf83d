package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hone-llm/hone/internal/store"
)

// Causes of the end of a batch's context.
var (
	errCancelled = errors.New("the batch was cancelled")
	errExpired   = errors.New("the batch's window is over")
)

// answerNext works on the oldest batch that is to be answered or ended, until that is done or broken off.
func (b *Batches) answerNext(ctx context.Context) error {
	row, err := b.opts.Store.NextBatch(ctx, Cancelling)
	if errors.Is(err, store.ErrNotFound) {
		row, err = b.opts.Store.NextBatch(ctx, InProgress, Finalizing)
	}
	if err != nil {
		return err
	}
	if row.Status == InProgress {
		if err := b.answer(ctx, row); err != nil {
			return err
		}
	}
	return b.finish(ctx, row)
}

// answer asks for what is not answered yet. It returns nil when all is, and when the batch was cancelled or has expired.
func (b *Batches) answer(ctx context.Context, row store.Batch) error {
	working, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	left := time.Unix(row.ExpiresAt, 0).Sub(b.opts.Now())
	working, free := context.WithTimeoutCause(working, left, errExpired)
	defer free()
	b.mu.Lock()
	b.running, b.stop = row.ID, stop
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.running = ""
		b.mu.Unlock()
	}()
	// Cancel may have come between the look at the row and this moment.
	if now, err := b.Get(ctx, row.ID); err != nil || now.Status != InProgress {
		return err
	}
	_, content, err := b.opts.Store.OpenFile(ctx, row.InputFile)
	if err != nil {
		return b.unreadable(ctx, row, err)
	}
	defer content.Close()
	answered, err := b.opts.Store.AnsweredLines(ctx, row.ID)
	if err != nil {
		return err
	}
	log := b.opts.Logger.With("batch_id", row.ID)
	log.Info("batch in progress", "requests", row.Total, "answered", len(answered))
	input := newLines(working, content)
	group, each := errgroup.WithContext(working)
	group.SetLimit(b.opts.InFlight)
	for {
		line, text, err := input.next()
		if errors.Is(err, io.EOF) || each.Err() != nil {
			break
		}
		if err != nil {
			_ = group.Wait() // this error is the first
			return ended(working, fmt.Errorf("line %d of the input file of batch %s: %w", line, row.ID, err))
		}
		if answered[line] {
			continue
		}
		group.Go(func() error { return b.ask(each, row, line, text) })
	}
	return ended(working, group.Wait())
}

// ended is nil where the batch's own end is the reason of err.
func ended(working context.Context, err error) error {
	if cause := context.Cause(working); errors.Is(cause, errCancelled) || errors.Is(cause, errExpired) {
		return nil
	}
	return err
}

// A batch looks every quietPoll whether users' requests are done. Where these never end, a request of it is asked all the same
// after maxQuiet: the runner lets it go on a little beside them.
const (
	quietPoll = 20 * time.Millisecond
	maxQuiet  = 10 * time.Second
)

// quiet waits until no model computes for a user, or for maxQuiet. It reports false when ctx has ended.
func (b *Batches) quiet(ctx context.Context) bool {
	for began := time.Now(); ctx.Err() == nil && b.api.Busy() && time.Since(began) < maxQuiet; {
		select {
		case <-time.After(quietPoll):
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}

// A request is asked again when the server says that it cannot answer now, and so often when it has failed itself.
const (
	maxFailures = 3
	minRetry    = 100 * time.Millisecond
	maxRetry    = 30 * time.Second
)

// ask gets the answer to one line and writes it into the journal.
func (b *Batches) ask(ctx context.Context, row store.Batch, line int, text []byte) error {
	var req request
	if err := json.Unmarshal(text, &req); err != nil {
		return fmt.Errorf("line %d of batch %s, which was valid: %w", line, row.ID, err)
	}
	failures := 0
	for wait := minRetry; ; wait = min(2*wait, maxRetry) {
		if !b.quiet(ctx) {
			return context.Cause(ctx)
		}
		answer := b.api.Answer(ctx, row.Endpoint, req.Body)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		later := answer.Status == http.StatusTooManyRequests || answer.Status == http.StatusServiceUnavailable && answer.RetryAfter > 0
		if answer.Status >= http.StatusInternalServerError && !later {
			failures++
		}
		if !later && (answer.Status < http.StatusInternalServerError || failures >= maxFailures) {
			return b.journal(ctx, row.ID, line, req.CustomID, answer)
		}
		select {
		case <-time.After(max(wait, answer.RetryAfter)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// outputLine is a line of the output or of the error file.
type outputLine struct {
	ID       string         `json:"id"`
	CustomID string         `json:"custom_id"`
	Response *lineResponse  `json:"response"`
	Error    *outputFailure `json:"error"`
}

type lineResponse struct {
	StatusCode int             `json:"status_code"`
	RequestID  string          `json:"request_id"`
	Body       json.RawMessage `json:"body"`
}

type outputFailure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func encodeLine(l outputLine) ([]byte, error) {
	l.ID = store.NewID("batch_req_", 24)
	var line bytes.Buffer
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	err := enc.Encode(l)
	return line.Bytes(), err
}

func (b *Batches) journal(ctx context.Context, id string, line int, customID string, answer Answer) error {
	if !json.Valid(answer.Body) {
		return fmt.Errorf("line %d of batch %s: the answer is not JSON: %.100q", line, id, answer.Body)
	}
	content, err := encodeLine(outputLine{CustomID: customID, Response: &lineResponse{StatusCode: answer.Status, RequestID: answer.RequestID, Body: answer.Body}})
	if err != nil {
		return fmt.Errorf("line %d of batch %s: %w", line, id, err)
	}
	err = b.opts.Store.PutBatchAnswer(ctx, id, store.BatchAnswer{
		Line: line, Failed: answer.Status != http.StatusOK, Content: bytes.TrimSuffix(content, []byte("\n")), Usage: usageOf(answer.Body),
	})
	if errors.Is(err, store.ErrStale) {
		return errCancelled
	}
	return err
}

// usageOf reads the usage of an answer; one without has none.
func usageOf(body []byte) store.BatchUsage {
	var answer struct {
		Usage struct {
			PromptTokens        int64 `json:"prompt_tokens"`
			CompletionTokens    int64 `json:"completion_tokens"`
			PromptTokensDetails struct {
				CachedTokens int64 `json:"cached_tokens"`
			} `json:"prompt_tokens_details"`
			CompletionTokensDetails struct {
				ReasoningTokens int64 `json:"reasoning_tokens"`
			} `json:"completion_tokens_details"`
		} `json:"usage"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return store.BatchUsage{}
	}
	u := answer.Usage
	return store.BatchUsage{
		PromptTokens: u.PromptTokens, CompletionTokens: u.CompletionTokens,
		CachedTokens: u.PromptTokensDetails.CachedTokens, ReasoningTokens: u.CompletionTokensDetails.ReasoningTokens,
	}
}

// finish ends a batch, whichever way its row says, with the files of what it has.
func (b *Batches) finish(ctx context.Context, row store.Batch) error {
	now := b.opts.Now
	row, err := b.opts.Store.UpdateBatch(ctx, row.ID, func(row *store.Batch) error {
		if row.Status == InProgress {
			row.Status, row.FinalizingAt = Finalizing, now().Unix()
		}
		return nil
	})
	if errors.Is(err, store.ErrStale) {
		return nil // it has failed
	}
	if err != nil {
		return err
	}
	end, reason := Completed, outputFailure{Code: "batch_expired", Message: "This request could not be executed before the completion window expired."}
	if row.Status == Cancelling {
		end, reason = Cancelled, outputFailure{Code: "batch_cancelled", Message: "This request was not executed before the batch was cancelled."}
	}
	rest, unanswered, err := b.unanswered(ctx, row, reason)
	if err != nil {
		return b.unreadable(ctx, row, err)
	}
	if end == Completed && unanswered > 0 {
		end = Expired
	}
	_, err = b.opts.Store.FinishBatch(ctx, row.ID, rest, func(row *store.Batch) error {
		row.Status = end
		switch end {
		case Completed:
			row.CompletedAt = now().Unix()
		case Expired:
			row.ExpiredAt = now().Unix()
		case Cancelled:
			row.CancelledAt = now().Unix()
		}
		return nil
	})
	if errors.Is(err, store.ErrStale) {
		return nil
	}
	if err == nil {
		b.opts.Logger.Info("batch ended", "batch_id", row.ID, "status", end, "completed", row.Completed, "failed", row.Failed, "unanswered", unanswered)
	}
	return err
}

// unanswered makes the error file's lines of the requests without an answer. A batch that was cancelled before it was
// validated has none: what its file holds is not known.
func (b *Batches) unanswered(ctx context.Context, row store.Batch, reason outputFailure) (rest []byte, n int, err error) {
	if row.InProgressAt == 0 {
		return nil, 0, nil
	}
	answered, err := b.opts.Store.AnsweredLines(ctx, row.ID)
	if err != nil || len(answered) == row.Total {
		return nil, 0, err
	}
	_, content, err := b.opts.Store.OpenFile(ctx, row.InputFile)
	if err != nil {
		return nil, 0, err
	}
	defer content.Close()
	input := newLines(ctx, content)
	for {
		line, text, err := input.next()
		if errors.Is(err, io.EOF) {
			return rest, n, nil
		}
		if err != nil {
			return nil, 0, err
		}
		if answered[line] {
			continue
		}
		var req request
		if err := json.Unmarshal(text, &req); err != nil {
			return nil, 0, fmt.Errorf("line %d: %w", line, err)
		}
		content, err := encodeLine(outputLine{CustomID: req.CustomID, Error: &reason})
		if err != nil {
			return nil, 0, err
		}
		rest, n = append(rest, content...), n+1
	}
}
