package llama

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/hone-llm/hone/internal/engine"
)

// Decoder is an engine.Decoder over a Context: any architecture that llama.cpp knows, on the CPU or GPUs. One adapter
// applies to a whole batch. A model that keeps a state instead of a key-value cache can only share and keep whole
// sequences. It is closed before its model.
type Decoder struct {
	context *Context
	batch   *Batch
	whole   bool // sequences cannot be cut
	limits  engine.Limits
	rows    [][]int // of the last batch: the rows with outputs of each part
	states  []bool  // the part's outputs are hidden states

	// The library does not say how many cells are in use, so they are counted here, under numbers of our own.
	held  [][]int32 // cells of each sequence, one a token
	users []int32   // sequences that hold each cell
	free  []int32   // cells that none holds

	ended time.Time // the last Decode, for the log
}

var _ engine.Decoder = (*Decoder)(nil)

// NewDecoder allocates a context and its batch. Options' MicroBatchTokens is BatchTokens unless it is given: a batch is
// computed at once. With less, a GPU computes a part of a batch while the next one's mask and graph are made.
func NewDecoder(m *Model, o ContextOptions) (*Decoder, error) {
	if o.MicroBatchTokens == 0 {
		o.MicroBatchTokens = o.BatchTokens
	}
	context, err := NewContext(m, o)
	if err != nil {
		return nil, err
	}
	d := &Decoder{
		context: context,
		batch:   NewBatch(context.batch),
		whole:   m.Recurrent(),
		limits: engine.Limits{
			Sequences:   context.sequences,
			CacheTokens: context.tokens,
			BatchTokens: context.batch,
			Vocabulary:  m.VocabularySize(),
			Embedding:   m.EmbeddingSize(),
		},
		held:  make([][]int32, context.sequences),
		users: make([]int32, context.tokens),
	}
	for cell := context.tokens - 1; cell >= 0; cell-- {
		d.free = append(d.free, int32(cell))
	}
	return d, nil
}

// Limits implements engine.Decoder.
func (d *Decoder) Limits() engine.Limits { return d.limits }

// LoadAdapter implements engine.Decoder.
func (d *Decoder) LoadAdapter(path string) (engine.Adapter, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("load adapter: %w", err)
	}
	weights, err := LoadAdapter(d.context.model, path)
	if err != nil {
		return nil, err
	}
	return &decoderAdapter{decoder: d, weights: weights, bytes: int(info.Size())}, nil
}

// decoderAdapter is an adapter of a Decoder. The last batch's stays set in the context, so the goroutine that calls Decode
// must also close it.
type decoderAdapter struct {
	decoder *Decoder
	weights *Adapter
	bytes   int // of the file, which is nearly all weights
}

// Bytes implements engine.Adapter.
func (a *decoderAdapter) Bytes() int { return a.bytes }

// Close implements engine.Adapter.
func (a *decoderAdapter) Close() {
	if a.decoder.context.adapter == a.weights {
		_ = a.decoder.context.SetAdapter(nil, 0) // fails only on a closed context, which uses none
	}
	a.weights.Free()
}

// Share implements engine.Decoder.
func (d *Decoder) Share(from, to engine.Sequence, n int) bool {
	source := d.held[from]
	if n <= 0 || n > len(source) || len(d.held[to]) > 0 || d.whole && n != len(source) {
		return false
	}
	if !d.context.CopySequence(int(from), int(to), n) {
		return false
	}
	d.held[to] = append(d.held[to][:0], source[:n]...)
	for _, cell := range source[:n] {
		d.users[cell]++
	}
	return true
}

// Truncate implements engine.Decoder.
func (d *Decoder) Truncate(s engine.Sequence, n int) bool {
	// Also where nothing seems to be cut: an aborted batch may have left more than is counted.
	kept := d.context.RemoveSequence(int(s), n)
	if !kept {
		d.context.RemoveSequence(int(s), 0) // never fails
		n = 0
	}
	cells := d.held[s]
	n = min(n, len(cells))
	for _, cell := range cells[n:] {
		if d.users[cell]--; d.users[cell] == 0 {
			d.free = append(d.free, cell)
		}
	}
	d.held[s] = cells[:n]
	return kept
}

// FreeTokens implements engine.Decoder.
func (d *Decoder) FreeTokens() int { return len(d.free) }

// Decode implements engine.Decoder.
func (d *Decoder) Decode(parts []engine.Part) error {
	if len(parts) == 0 {
		return errors.New("decode: the batch is empty")
	}
	var adapter *Adapter
	if a, ok := parts[0].Adapter.(*decoderAdapter); ok {
		adapter = a.weights
	}
	d.batch.Reset()
	d.rows, d.states = d.rows[:0], d.states[:0]
	states := false
	for i, part := range parts {
		if part.Adapter != parts[0].Adapter {
			return errors.New("decode: the batch has parts of several adapters, which llama.cpp cannot compute together")
		}
		if part.Position != len(d.held[part.Sequence]) {
			return fmt.Errorf("decode: part %d begins at position %d, its sequence holds %d tokens", i, part.Position, len(d.held[part.Sequence]))
		}
		if d.batch.Len()+len(part.Tokens) > d.limits.BatchTokens {
			return fmt.Errorf("decode: the batch has more than %d tokens", d.limits.BatchTokens)
		}
		var rows []int
		for j, token := range part.Tokens {
			wanted := part.Want == engine.WantAll || part.Want == engine.WantState || part.Want == engine.WantLast && j == len(part.Tokens)-1
			row := d.batch.Add(token, part.Position+j, int(part.Sequence), wanted)
			if wanted {
				rows = append(rows, row)
			}
		}
		d.rows, d.states = append(d.rows, rows), append(d.states, part.Want == engine.WantState)
		states = states || part.Want == engine.WantState
	}
	if d.batch.Len() > len(d.free) {
		return engine.ErrNoRoom
	}
	if err := d.context.SetAdapter(adapter, 1); err != nil {
		return err
	}
	d.context.SetEmbeddings(states)
	began := time.Now()
	if err := d.context.Decode(d.batch); err != nil {
		return err
	}
	d.log(len(parts), began)
	for _, part := range parts {
		for range part.Tokens {
			cell := d.free[len(d.free)-1]
			d.free = d.free[:len(d.free)-1]
			d.users[cell] = 1
			d.held[part.Sequence] = append(d.held[part.Sequence], cell)
		}
	}
	return nil
}

// log writes what a batch cost at debug level: milliseconds until everything was handed to the devices, those that they
// then took, and those since the batch before.
func (d *Decoder) log(parts int, began time.Time) {
	library.Lock()
	logger := library.logger
	library.Unlock()
	now := time.Now()
	if logger != nil && logger.Enabled(context.Background(), slog.LevelDebug) {
		milliseconds := func(t time.Duration) float64 { return float64(t.Microseconds()) / 1000 }
		between := time.Duration(0)
		if !d.ended.IsZero() {
			between = began.Sub(d.ended)
		}
		logger.Debug("batch", slog.Int("parts", parts), slog.Int("tokens", d.batch.Len()), slog.Int("cells", len(d.users)-len(d.free)),
			slog.Float64("submit_ms", milliseconds(d.context.submitted.Sub(began))), slog.Float64("wait_ms", milliseconds(now.Sub(d.context.submitted))),
			slog.Float64("between_ms", milliseconds(between)))
	}
	d.ended = now
}

// Output implements engine.Decoder.
func (d *Decoder) Output(part, i int) []float32 {
	row := d.rows[part][i]
	if d.states[part] {
		return d.context.State(row)
	}
	return d.context.Logits(row)
}

// Abort implements engine.Decoder; it works on the CPU only.
func (d *Decoder) Abort() { d.context.Abort() }

// ResetAbort implements engine.Decoder.
func (d *Decoder) ResetAbort() { d.context.ResetAbort() }

// Close frees the context. It may be called twice and on nil.
func (d *Decoder) Close() {
	if d != nil {
		d.batch.Close()
		d.context.Close()
	}
}
