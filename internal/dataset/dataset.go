// Package dataset turns a chat JSONL file into token sequences with loss weights, orders them by seed and packs them
// into micro-batches.
//
//	data, err := dataset.Read(ctx, "train.jsonl", builder, maxLength)
//	for _, rows := range dataset.Batches(data.Order(seed, epoch), batchSize) {
//		for _, micro := range data.Pack(rows, 1024) { ... }
//	}
package dataset

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"

	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// MaxLineBytes is the longest line of a dataset file.
const MaxLineBytes = 16 << 20

// ErrNoRows reports a file of which nothing is left to train on.
var ErrNoRows = errors.New("no rows to train on")

// LineError is a row that cannot be used: the line it stands on, counted from 1, and why.
type LineError struct {
	Line   int
	Reason string
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %s", e.Line, e.Reason) }

// Dataset holds the rows of one file in memory.
type Dataset struct {
	Rows    []prompt.Row
	Tokens  int // of all rows
	Targets int // tokens with a loss weight other than 0
	Longest int // tokens of the longest row
	Dropped int // rows longer than the maximum length, which are left out whole: an answer is never cut

	SystemMessage string   // if all rows begin with the same one
	Answers       []string // the distinct last answers, sorted, if they are at most maxAnswers
}

// maxAnswers is how many different answers still look like the choices of one question type.
const maxAnswers = 16

// Read reads a JSONL file of {"messages": [...]} rows and tokenizes them. A byte order mark, CRLF and empty lines are
// accepted. Errors are *LineError for a bad row, ErrNoRows, ctx's or the file's own.
func Read(ctx context.Context, path string, builder *prompt.Builder, maxLength int) (*Dataset, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("dataset: %w", err)
	}
	defer f.Close()
	return read(ctx, f, builder, maxLength) // its errors name the line; the path of a blob would say nothing to the user
}

func read(ctx context.Context, r io.Reader, builder *prompt.Builder, maxLength int) (*Dataset, error) {
	d := new(Dataset)
	systems, answers := make(map[string]bool), make(map[string]bool)
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 64<<10), MaxLineBytes)
	number := 0
	for lines.Scan() {
		number++
		line := bytes.TrimSpace(lines.Bytes())
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		if len(line) == 0 {
			continue
		}
		var row struct {
			Messages []wire.Message `json:"messages"`
		}
		if err := json.Unmarshal(line, &row); err != nil {
			return nil, &LineError{number, fmt.Sprintf(`expected {"messages": [...]}: %v`, err)}
		}
		if len(row.Messages) == 0 {
			return nil, &LineError{number, `expected {"messages": [...]} with at least one message`}
		}
		rows, err := builder.Rows(ctx, row.Messages)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, &LineError{number, err.Error()}
		}
		for _, r := range rows {
			d.add(r, maxLength)
		}
		first, last := row.Messages[0], row.Messages[len(row.Messages)-1]
		system := ""
		if first.Role == "system" {
			system = first.Content
		}
		systems[system] = true
		if len(answers) <= maxAnswers {
			answers[last.Content] = true
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return nil, &LineError{number + 1, fmt.Sprintf("longer than %d MiB", MaxLineBytes>>20)}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	switch {
	case len(d.Rows) == 0 && d.Dropped > 0:
		return nil, fmt.Errorf("all %d rows are longer than max_length, %d tokens: %w", d.Dropped, maxLength, ErrNoRows)
	case len(d.Rows) == 0:
		return nil, fmt.Errorf("the file is empty: %w", ErrNoRows)
	}
	if len(systems) == 1 {
		for s := range systems {
			d.SystemMessage = s
		}
	}
	if len(answers) <= maxAnswers {
		for a := range answers {
			d.Answers = append(d.Answers, a)
		}
		slices.Sort(d.Answers)
	}
	return d, nil
}

func (d *Dataset) add(r prompt.Row, maxLength int) {
	if len(r.Tokens) > maxLength {
		d.Dropped++
		return
	}
	d.Rows = append(d.Rows, r)
	d.Tokens += len(r.Tokens)
	d.Longest = max(d.Longest, len(r.Tokens))
	for _, w := range r.Weights {
		if w != 0 {
			d.Targets++
		}
	}
}

// Order is the sequence of row numbers of an epoch (counted from 0), shuffled by seed: the same for the same arguments.
func (d *Dataset) Order(seed int64, epoch int) []int {
	order := d.Sequence()
	random := rand.New(rand.NewPCG(uint64(seed), uint64(epoch)))
	random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	return order
}

// Sequence is the row numbers in the file's order.
func (d *Dataset) Sequence() []int {
	order := make([]int, len(d.Rows))
	for i := range order {
		order[i] = i
	}
	return order
}

// Pack splits rows into runs of at most maxTokens tokens, keeping their order. A longer row is a run of its own.
func (d *Dataset) Pack(rows []int, maxTokens int) [][]int {
	var runs [][]int
	tokens := 0
	for i, start := 0, 0; i < len(rows); i++ {
		n := len(d.Rows[rows[i]].Tokens)
		if i > start && tokens+n > maxTokens {
			runs = append(runs, rows[start:i])
			start, tokens = i, 0
		}
		tokens += n
		if i == len(rows)-1 {
			runs = append(runs, rows[start:])
		}
	}
	return runs
}
