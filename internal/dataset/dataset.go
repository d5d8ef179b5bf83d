// Package dataset turns a JSONL file into examples to train on, orders them by seed and packs them into micro-batches.
//
//	data, err := dataset.Open(ctx, "train.jsonl", builder, dataset.Options{MaxLength: 2048, CacheDir: dir})
//	defer data.Close()
//	order := data.Order(seed, epoch)
//	examples, err := data.Examples(order, 0, batchSize)
//	for _, micro := range dataset.Pack(examples, 1024, true) { ... micro.Batch ... }
//
// A file is tokenized once, by all cores, into a file of its own that is read row by row: the memory that a dataset
// takes is 12 bytes a row, of the index and of an epoch's order.
//
// # Rows
//
// The first row of a file says what it holds, and all others must hold the same:
//
//	{"messages": [...], "tools": [...]}            a conversation; weight 0 on an assistant message leaves it untrained
//	{"prompt": "...", "completion": "..."}         plain text without a chat template; lists of messages use the template
//	{"text": "..."}                                plain text, trained from its second token on
//	{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}      two answers (OpenAI)
//	{"prompt": ..., "chosen": ..., "rejected": ...}         two answers (TRL): texts, or lists of messages
package dataset

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/prompt"
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

// Options of Open. All but CacheDir and Progress decide what the examples are.
type Options struct {
	// MaxLength is the most tokens of a row; 0 allows any. Longer rows are left out whole, or, with Truncate, lose the
	// left of their prompt: BOS stays, if there is one, and so does the whole last answer. Earlier answers that would be
	// cut are not trained. A row whose answer alone is too long, and a plain text, which has no prompt, are left out.
	MaxLength int
	Truncate  bool
	// TrainOnAll trains every token of a row after its first, whatever the weights of its messages.
	TrainOnAll bool
	// Choices makes an example with one candidate for each of them. Every row's last answer must be one of them, but for
	// white space around it. Only the choices' own tokens are weighed, and the end of the turn where one of them begins
	// with another.
	Choices []string
	// DPO expects rows with two answers, and makes of each an example with two candidates, the preferred one first.
	DPO bool
	// CacheDir keeps the tokenized file for the next Open with the same content, model and options. "" makes a file that
	// is gone after Close.
	CacheDir string
	// Progress is told now and then how many rows are tokenized; nil is not.
	Progress func(rows int)
}

func (o Options) validate() error {
	for i, choice := range o.Choices {
		switch {
		case len(o.Choices) < 2:
			return errors.New("choices: expected at least two")
		case choice == "" || strings.TrimSpace(choice) != choice:
			return fmt.Errorf("choices[%d] is %q: expected a text without white space around it", i, choice)
		case slices.Contains(o.Choices[:i], choice):
			return fmt.Errorf("choices[%d]: %q is there twice", i, choice)
		}
	}
	switch {
	case o.DPO && len(o.Choices) > 0:
		return errors.New("choices: a preference job (DPO) compares the two answers of a row and takes no choices")
	case o.TrainOnAll && (o.DPO || len(o.Choices) > 0):
		return errors.New("train_on_all: a job that compares answers has no loss on the prompt")
	}
	return nil
}

// Example is what an optimizer step takes a batch of: candidates that begin with the same prompt. Fine-tuning on
// answers has one, DPO two, the preferred one first, and a choice one for each text that may be chosen.
type Example struct {
	Row        int // its number in the dataset, from 0
	Candidates []prompt.Row
	Right      int // the candidate that the row has, or prefers
	// Tokens is what the example counts for: the tokens of its row, and of both rows of a preference. A prefix that is
	// shared counts in each.
	Tokens int
}

// Summary is what Open found in a file.
type Summary struct {
	Rows      int `json:"rows"`      // examples
	Tokens    int `json:"tokens"`    // of all examples, as Example.Tokens
	Targets   int `json:"targets"`   // tokens with a loss weight other than 0, of all candidates
	Longest   int `json:"longest"`   // tokens of the longest candidate
	Dropped   int `json:"dropped"`   // rows left out for MaxLength
	Truncated int `json:"truncated"` // rows that lost a part of their prompt to MaxLength

	DroppedLines   []int `json:"dropped_lines"` // where these stand in the file, at most maxLines of each
	TruncatedLines []int `json:"truncated_lines"`

	SystemMessage string   `json:"system_message"` // if all conversations begin with the same one
	Answers       []string `json:"answers"`        // the distinct last answers, sorted, if they are at most maxAnswers
}

// maxLines is how many lines a summary names.
const maxLines = 20

// maxAnswers is how many different answers still look like the choices of one question type.
const maxAnswers = 16

// Dataset is the examples of one file, on disk. Goroutines may share it; Close it when none uses it.
type Dataset struct {
	Summary
	file  *os.File
	index []uint64 // [Rows+1] where each example begins in file, and where the last ends
}

// Open reads a JSONL file and tokenizes it, or takes what an earlier Open has left in CacheDir. A byte order mark, CRLF
// and empty lines are accepted. Errors are *LineError for a bad row, ErrNoRows, ctx's, or of the files.
func Open(ctx context.Context, path string, builder *prompt.Builder, o Options) (*Dataset, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("dataset: %w", err)
	}
	defer f.Close()
	// Errors of a row name the line; the path of a blob would say nothing to the user.
	if o.CacheDir == "" {
		return build(ctx, f, builder, o, cacheKey{}, "")
	}
	key, err := keyOf(f, builder, o)
	if err != nil {
		return nil, err
	}
	cached := cachePath(o.CacheDir, key)
	if d, err := openCache(cached, key); err == nil {
		return d, nil
	}
	// There is none, or it is damaged: the file that replaces it is as good.
	return build(ctx, f, builder, o, key, cached)
}

// New returns a dataset of examples made elsewhere, in a file that is gone after Close. It numbers them, and counts
// their tokens where Tokens is 0.
func New(examples ...Example) (*Dataset, error) {
	w, err := newWriter("", cacheKey{})
	if err != nil {
		return nil, err
	}
	for _, e := range examples {
		if e.Tokens == 0 {
			e.Tokens = len(e.Candidates[e.Right].Tokens)
		}
		record := appendExample(nil, e)
		if err := w.add(record, []int{len(record)}); err != nil {
			w.discard()
			return nil, err
		}
		w.summary.count(e)
	}
	return w.finish()
}

func (s *Summary) count(e Example) {
	s.Rows++
	s.Tokens += e.Tokens
	for _, c := range e.Candidates {
		s.Longest = max(s.Longest, len(c.Tokens))
		for _, w := range c.Weights {
			if w != 0 {
				s.Targets++
			}
		}
	}
}

// Close removes the file if it is in no CacheDir. It may be called twice and on nil.
func (d *Dataset) Close() error {
	if d == nil || d.file == nil {
		return nil
	}
	err := d.file.Close()
	d.file = nil
	return err
}

// Len is the number of examples.
func (d *Dataset) Len() int { return d.Rows }

// Example reads one, counted from 0.
func (d *Dataset) Example(row int) (Example, error) {
	if row < 0 || row >= d.Rows {
		return Example{}, fmt.Errorf("dataset: row %d of %d", row, d.Rows)
	}
	record := make([]byte, d.index[row+1]-d.index[row])
	if _, err := d.file.ReadAt(record, int64(d.index[row])); err != nil {
		return Example{}, fmt.Errorf("dataset: read row %d: %w", row, err)
	}
	e, err := decodeExample(record)
	if err != nil {
		return Example{}, fmt.Errorf("dataset: row %d: %w", row, err)
	}
	e.Row = row
	return e, nil
}

// Examples reads those at positions [from, to) of an order, fewer at its end.
func (d *Dataset) Examples(o Order, from, to int) ([]Example, error) {
	to = min(to, o.Len())
	examples := make([]Example, 0, max(0, to-from))
	for i := from; i < to; i++ {
		e, err := d.Example(o.At(i))
		if err != nil {
			return nil, err
		}
		examples = append(examples, e)
	}
	return examples, nil
}
