package llama

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/modeltest"
)

const text = "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"

func newContext(t *testing.T, m *Model, o ContextOptions) (*Context, *Batch) {
	t.Helper()
	o.Threads = 1 // other packages' tests run beside
	c, err := NewContext(m, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	b := NewBatch(512)
	t.Cleanup(b.Close)
	return c, b
}

// logits decodes the tokens as a sequence from position first on and returns a copy of the last one's logits.
func logits(t *testing.T, c *Context, b *Batch, tokens []engine.Token, sequence, first int) []float32 {
	t.Helper()
	b.Reset()
	row := 0
	for i, token := range tokens {
		row = b.Add(token, first+i, sequence, i == len(tokens)-1)
	}
	if err := c.Decode(b); err != nil {
		t.Fatal(err)
	}
	if len(tokens) > 1 && c.Logits(0) != nil {
		t.Error("a row that asked for no logits has some")
	}
	l := c.Logits(row)
	if len(l) != c.model.VocabularySize() {
		t.Fatalf("%d logits, want %d", len(l), c.model.VocabularySize())
	}
	return slices.Clone(l)
}

func TestSequences(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	c, b := newContext(t, m, ContextOptions{Tokens: 512, Sequences: 4})
	tokens, err := m.Tokenize(text, false, true)
	if err != nil {
		t.Fatal(err)
	}
	n := len(tokens)
	want := logits(t, c, b, tokens, 0, 0)
	if got := c.SequenceTokens(0); got != n {
		t.Errorf("sequence 0 has %d tokens, want %d", got, n)
	}

	// The last token again, after it was removed.
	if !c.RemoveSequence(0, n-1) || c.SequenceTokens(0) != n-1 {
		t.Errorf("%d tokens after removing the last of %d", c.SequenceTokens(0), n)
	}
	if got := logits(t, c, b, tokens[n-1:], 0, n-1); !slices.Equal(got, want) {
		t.Error("the last token computed again has other logits")
	}
	// On a copy of the beginning, in two parts.
	if !c.CopySequence(0, 2, 5) || c.SequenceTokens(2) != 5 {
		t.Errorf("%d tokens copied, want 5", c.SequenceTokens(2))
	}
	if got := logits(t, c, b, tokens[5:], 2, 5); !slices.Equal(got, want) {
		t.Error("a sequence that goes on from a copy has other logits")
	}
	c.KeepSequence(2)
	if c.SequenceTokens(0) != 0 || c.SequenceTokens(2) != n {
		t.Errorf("after keeping sequence 2: %d and %d tokens", c.SequenceTokens(0), c.SequenceTokens(2))
	}
	c.Clear()
	if c.SequenceTokens(2) != 0 {
		t.Error("something is left after Clear")
	}
}

func TestDecodeRefuses(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	c, b := newContext(t, m, ContextOptions{Tokens: 256, Sequences: 2})
	if err := c.Decode(b); err == nil {
		t.Error("an empty batch was decoded")
	}
	for _, row := range []struct{ token, position, sequence int }{
		{-1, 0, 0}, {m.VocabularySize(), 0, 0}, {1, 0, 2}, {1, 0, -1},
	} {
		b.Reset()
		b.Add(engine.Token(row.token), row.position, row.sequence, true)
		if err := c.Decode(b); err == nil {
			t.Errorf("token %d at position %d of sequence %d was decoded", row.token, row.position, row.sequence)
		}
	}
	b.Reset()
	for i := range 257 {
		b.Add(1, i, 0, false)
	}
	if err := c.Decode(b); err == nil {
		t.Error("a batch longer than BatchTokens was decoded")
	}
	b.Reset()
	for i := range 200 {
		b.Add(1, i, 0, false)
	}
	if err := c.Decode(b); err != nil {
		t.Error(err)
	}
	b.Reset()
	for i := range 100 {
		b.Add(1, i, 1, i == 99)
	}
	if err := c.Decode(b); !errors.Is(err, engine.ErrNoRoom) {
		t.Errorf("100 tokens where 56 cells are free: %v, want ErrNoRoom", err)
	}
	if c.Logits(99) != nil || c.SequenceTokens(0) != 200 || c.SequenceTokens(1) != 0 {
		t.Error("the failed batch changed the cache")
	}
	for range 600 {
		b.Add(1, 0, 0, false)
	}
	if b.Len() != 512 {
		t.Errorf("a batch for 512 rows has %d", b.Len())
	}

	c.Close()
	c.Close()
	if err := c.Decode(b); !errors.Is(err, ErrClosed) {
		t.Errorf("decode after Close: %v", err)
	}
	if err := c.SetAdapter(nil, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("set adapter after Close: %v", err)
	}
	c.Abort()
	c.ResetAbort()
	if c.RemoveSequence(0, 0) || c.Logits(0) != nil {
		t.Error("a closed context has sequences")
	}
}

func TestVocabularyOnlyHasNoContext(t *testing.T) {
	m := loadModel(t, ModelOptions{VocabularyOnly: true})
	if _, err := NewContext(m, ContextOptions{Tokens: 256}); err == nil {
		t.Error("a model without weights got a context")
	}
	if _, err := LoadAdapter(m, "adapter.gguf"); err == nil {
		t.Error("a model without weights got an adapter")
	}
}

func TestAbort(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	c, b := newContext(t, m, ContextOptions{Tokens: 512})
	for i := range 512 {
		b.Add(engine.Token(100+i), i, 0, false)
	}
	timer := time.AfterFunc(20*time.Millisecond, c.Abort)
	defer timer.Stop()
	start := time.Now()
	if err := c.Decode(b); !errors.Is(err, engine.ErrAborted) {
		t.Fatalf("after %v: %v, want ErrAborted", time.Since(start), err)
	}
	c.ResetAbort()
	c.RemoveSequence(0, 0)
	logits(t, c, b, []engine.Token{100, 101}, 0, 0)
}

func TestAdapter(t *testing.T) {
	m := loadModel(t, ModelOptions{})
	c, b := newContext(t, m, ContextOptions{Tokens: 256})
	a, err := LoadAdapter(m, randomAdapter(t))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Free()
	tokens := []engine.Token{100, 200, 300}
	once := func() []float32 {
		c.RemoveSequence(0, 0)
		return logits(t, c, b, tokens, 0, 0)
	}
	set := func(a *Adapter, scale float32) {
		t.Helper()
		if err := c.SetAdapter(a, scale); err != nil {
			t.Fatal(err)
		}
	}
	// The same batch shape each time: the library must not run an earlier graph again.
	base := once()
	set(a, 1)
	with := once()
	set(a, 2)
	double := once()
	set(nil, 0)
	if slices.Equal(base, with) || slices.Equal(with, double) {
		t.Error("setting an adapter or its scale changes nothing")
	}
	if !slices.Equal(base, once()) {
		t.Error("the base model's logits differ after the adapter was removed")
	}
	set(a, 1)
	if !slices.Equal(with, once()) {
		t.Error("the adapter's logits differ when it is set again")
	}
	set(a, 0)
	if !slices.Equal(base, once()) {
		t.Error("an adapter with scale 0 changes the logits")
	}
	set(nil, 0)
	a.Free()
	a.Free()
	if err := c.SetAdapter(a, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("a freed adapter was set: %v", err)
	}
	if _, err := LoadAdapter(m, modeltest.Path(t)); err == nil {
		t.Error("a base model was loaded as an adapter")
	}
}

func randomAdapter(t *testing.T) string {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	matrix := func(name string, columns, rows int64) gguf.TensorData {
		data := make([]byte, 0, 4*columns*rows)
		for range columns * rows {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(random.NormFloat64()*0.1)))
		}
		return gguf.TensorData{Name: name, Shape: []int64{columns, rows}, Type: gguf.F32, Data: data}
	}
	var tensors []gguf.TensorData
	for layer := range 30 {
		name := fmt.Sprintf("blk.%d.attn_q.weight.lora_", layer)
		tensors = append(tensors, matrix(name+"a", 576, 4), matrix(name+"b", 4, 576))
	}
	path := filepath.Join(t.TempDir(), "adapter.gguf")
	if err := gguf.WriteFile(path, []gguf.KeyValue{
		{Key: "general.type", Value: "adapter"}, {Key: "general.architecture", Value: "llama"},
		{Key: "adapter.type", Value: "lora"}, {Key: "adapter.lora.alpha", Value: float32(8)},
	}, tensors); err != nil {
		t.Fatal(err)
	}
	return path
}
