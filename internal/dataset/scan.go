package dataset

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

const (
	batchLines = 64       // that a worker takes at once
	batchBytes = 64 << 10 // about as many as that
)

// batch is some lines of the file on their way to a worker, and what it makes of them on its way back.
type batch struct {
	first int // line number of the first
	lines [][]byte
	err   error // of reading the file behind the lines
	done  chan worked
}

// worked is a batch's rows, up to the first that cannot be used.
type worked struct {
	lines []workedLine
	line  int // of err; 0 if it is of no line
	err   error
}

type workedLine struct {
	parsed
	number  int
	records []byte // of its examples that are left
	lengths []int  // of the records
	summary Summary
}

// build tokenizes a file with all cores into a file at path, or one without a name. Rows keep the file's order.
func build(ctx context.Context, r io.Reader, builder *prompt.Builder, o Options, key cacheKey, path string) (*Dataset, error) {
	w, err := newWriter(path, key)
	if err != nil {
		return nil, err
	}
	if err := scan(ctx, r, builder, o, w); err != nil {
		w.discard()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, err
	}
	return w.finish()
}

func scan(ctx context.Context, r io.Reader, builder *prompt.Builder, o Options, w *writer) error {
	workers := runtime.GOMAXPROCS(0)
	group, ctx := errgroup.WithContext(ctx)
	work, order := make(chan batch), make(chan batch, 2*workers)
	group.Go(func() error {
		defer close(work)
		defer close(order)
		return read(ctx, r, func(b batch) error {
			for _, to := range []chan batch{order, work} {
				select {
				case to <- b:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	})
	for range workers {
		group.Go(func() error {
			for b := range work {
				b.done <- o.tokenize(ctx, builder, b)
			}
			return nil
		})
	}
	group.Go(func() error { return collect(ctx, order, o, w) })
	return group.Wait()
}

// read cuts the file into batches.
func read(ctx context.Context, r io.Reader, send func(batch) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 64<<10), MaxLineBytes)
	next, size, number := batch{first: 1}, 0, 0
	flush := func() error {
		next.done = make(chan worked, 1)
		err := send(next)
		next, size = batch{first: number + 1}, 0
		return err
	}
	for lines.Scan() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		number++
		line := lines.Bytes()
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		line = bytes.Clone(bytes.TrimSpace(line))
		next.lines = append(next.lines, line)
		if size += len(line); len(next.lines) == batchLines || size >= batchBytes {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	next.err = lines.Err()
	if errors.Is(next.err, bufio.ErrTooLong) {
		next.err = &LineError{number + 1, fmt.Sprintf("longer than %d MiB", MaxLineBytes>>20)}
	}
	return flush()
}

// tokenize makes records of a batch's lines.
func (o Options) tokenize(ctx context.Context, builder *prompt.Builder, b batch) worked {
	done := worked{err: b.err}
	for i, line := range b.lines {
		if len(line) == 0 {
			continue
		}
		l := workedLine{number: b.first + i}
		var err error
		if l.parsed, err = o.parse(ctx, builder, line); err != nil {
			done.line, done.err = l.number, err
			// The line is passed on too: that it is of another kind than the first explains more than what follows from that.
			done.lines = append(done.lines, workedLine{parsed: parsed{kind: l.kind}, number: l.number})
			return done
		}
		for _, e := range l.examples {
			switch o.fit(&e, builder) {
			case dropped:
				l.summary.Dropped++
				continue
			case truncated:
				l.summary.Truncated++
			case kept:
			}
			before := len(l.records)
			l.records = appendExample(l.records, e)
			l.lengths = append(l.lengths, len(l.records)-before)
			l.summary.count(e)
		}
		l.examples = nil
		done.lines = append(done.lines, l)
	}
	return done
}

// collect writes the batches in order and adds up what they hold.
func collect(ctx context.Context, order <-chan batch, o Options, w *writer) error {
	s := &w.summary
	var kind wire.RowKind
	rows, oneSystem, answers := 0, true, make(map[string]bool)
	for b := range order {
		var done worked
		select {
		case done = <-b.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		for _, l := range done.lines {
			if kind == "" {
				kind = l.kind
			}
			if l.kind != kind && l.kind != "" {
				return &LineError{l.number, fmt.Sprintf("a %v row, but the first row of the file is %v; expected all rows to be of one kind", l.kind, kind)}
			}
			if l.number == done.line {
				break
			}
			if err := w.add(l.records, l.lengths); err != nil {
				return err
			}
			s.Rows += l.summary.Rows
			s.Tokens += l.summary.Tokens
			s.Targets += l.summary.Targets
			s.Longest = max(s.Longest, l.summary.Longest)
			s.Dropped += l.summary.Dropped
			s.Truncated += l.summary.Truncated
			if l.summary.Dropped > 0 && len(s.DroppedLines) < maxLines {
				s.DroppedLines = append(s.DroppedLines, l.number)
			}
			if l.summary.Truncated > 0 && len(s.TruncatedLines) < maxLines {
				s.TruncatedLines = append(s.TruncatedLines, l.number)
			}
			if rows == 0 {
				s.SystemMessage = l.system
			}
			oneSystem = oneSystem && s.SystemMessage == l.system
			if !l.answered {
				answers = nil // rows of other kinds have no answers that could be choices
			}
			if answers != nil && len(answers) <= maxAnswers {
				answers[l.answer] = true
			}
			rows++
		}
		if done.err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if done.line == 0 {
				return done.err
			}
			return &LineError{done.line, done.err.Error()}
		}
		if o.Progress != nil {
			o.Progress(rows)
		}
	}
	if ctx.Err() != nil { // the reader has stopped
		return ctx.Err()
	}
	switch {
	case rows == 0:
		return fmt.Errorf("the file is empty: %w", ErrNoRows)
	case s.Rows == 0 && o.Truncate:
		return fmt.Errorf("the answers of all %d rows leave no place for a prompt in max_length, %d tokens: %w", s.Dropped, o.MaxLength, ErrNoRows)
	case s.Rows == 0:
		return fmt.Errorf("all %d rows are longer than max_length, %d tokens: %w", s.Dropped, o.MaxLength, ErrNoRows)
	}
	if !oneSystem {
		s.SystemMessage = ""
	}
	if len(answers) <= maxAnswers {
		for answer := range answers {
			s.Answers = append(s.Answers, answer)
		}
		slices.Sort(s.Answers)
	}
	return nil
}
