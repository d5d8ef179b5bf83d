package llama

/*
#include "bridge.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"github.com/hone-llm/hone/internal/engine"
)

// ContextOptions of NewContext.
type ContextOptions struct {
	Tokens           int // cells of the key-value cache, shared by all sequences; required
	Sequences        int // sequence numbers are in [0, Sequences); 0 means 1
	BatchTokens      int // most tokens of one Decode; 0 means 2048, and never more than Tokens
	MicroBatchTokens int // most tokens of one graph; 0 means 512
	Threads          int // 0 means all cores
	// Attention is how attention is computed. On a CPU, flash attention skips what the mask hides, so other sequences in
	// the cache cost little (1,024 resident tokens: 3% of the prefill), and a row's logits do not depend on what else is
	// in the batch. As a matrix, they did (root mean square 0.15 to 0.56 on a Q4_1 model), and long batches of several
	// sequences ran at half the speed.
	Attention Attention
	// CacheQ8 keeps keys and values as q8_0 instead of f16: half the memory; it needs flash attention.
	CacheQ8 bool
	// SeparateCaches gives each sequence Tokens/Sequences cells of its own. Then CopySequence cannot copy a part.
	SeparateCaches bool
}

// Attention is a way to compute attention.
type Attention int

// Ways to compute attention.
const (
	AttentionFlash Attention = iota // one fused operation, no score matrix (llama.cpp's flash attention)
	AttentionPlain                  // scores as a matrix
	AttentionAuto                   // AttentionFlash where the device that holds a layer can compute it, else AttentionPlain
)

// Context holds the key-value cache of up to Sequences sequences and decodes batches of their tokens. One goroutine at
// a time may use it, but for Abort. It must be closed before its model and after adapters were removed from it.
type Context struct {
	model      *Model
	c          *C.struct_llama_context
	memory     *C.struct_llama_memory_i
	abort      *C.int // C memory: the abort callback reads it
	abortLock  sync.Mutex
	sequences  int
	batch      int
	tokens     int
	separate   bool
	embeddings bool
	rows       map[int]bool // rows of the last Decode that have logits
	adapter    *Adapter
	scale      float32
	submitted  time.Time // when the last Decode had nothing left to do but to wait for a GPU
}

// NewContext allocates a context (llama_init_from_model).
func NewContext(m *Model, o ContextOptions) (*Context, error) {
	if m.c == nil {
		return nil, ErrClosed
	}
	if m.vocabularyOnly {
		return nil, errors.New("new context: the model was loaded without its weights (VocabularyOnly)")
	}
	if o.Tokens <= 0 {
		return nil, fmt.Errorf("new context: Tokens is %d, it must be positive", o.Tokens)
	}
	if o.Sequences == 0 {
		o.Sequences = 1
	}
	if o.BatchTokens == 0 {
		o.BatchTokens = 2048
	}
	if o.MicroBatchTokens == 0 {
		o.MicroBatchTokens = 512
	}
	if o.Threads == 0 {
		o.Threads = runtime.NumCPU()
	}
	params := C.llama_context_default_params()
	params.n_ctx = C.uint32_t(o.Tokens)
	params.n_batch = C.uint32_t(o.BatchTokens)
	params.n_ubatch = C.uint32_t(min(o.MicroBatchTokens, o.BatchTokens))
	params.n_seq_max = C.uint32_t(o.Sequences)
	params.n_threads = C.int32_t(o.Threads)
	params.n_threads_batch = C.int32_t(o.Threads)
	params.flash_attn_type = C.HONE_LLAMA_FLASH_ATTN_TYPE_ENABLED
	switch o.Attention {
	case AttentionFlash:
	case AttentionPlain:
		params.flash_attn_type = C.HONE_LLAMA_FLASH_ATTN_TYPE_DISABLED
	case AttentionAuto:
		params.flash_attn_type = C.HONE_LLAMA_FLASH_ATTN_TYPE_AUTO
	}
	if o.CacheQ8 {
		params.type_k, params.type_v = C.HONE_GGML_TYPE_Q8_0, C.HONE_GGML_TYPE_Q8_0
	}
	params.pooling_type = C.HONE_LLAMA_POOLING_TYPE_NONE // the states of single tokens, whatever the file says
	params.kv_unified = C.bool(!o.SeparateCaches)
	params.no_perf = true
	ctx := &Context{model: m, separate: o.SeparateCaches, rows: map[int]bool{}}
	ctx.abort = (*C.int)(C.calloc(1, C.size_t(unsafe.Sizeof(C.int(0)))))
	params.abort_callback = (*[0]byte)(C.hone_abort)
	params.abort_callback_data = unsafe.Pointer(ctx.abort)
	ok, reason := failure(func() bool {
		ctx.c = C.llama_init_from_model(m.c, params)
		return ctx.c != nil
	})
	if !ok {
		ctx.Close()
		return nil, fmt.Errorf("new context of %d tokens: %s", o.Tokens, reason)
	}
	ctx.memory = C.llama_get_memory(ctx.c)
	if ctx.memory == nil {
		ctx.Close()
		return nil, errors.New("new context: this kind of model generates no text")
	}
	// What the library made of the request is what counts from here on.
	ctx.sequences = int(C.llama_n_seq_max(ctx.c))
	ctx.batch = int(C.llama_n_batch(ctx.c))
	ctx.tokens = int(C.llama_n_ctx(ctx.c))
	return ctx, nil
}

// Close frees the context (llama_free). It may be called twice and on nil.
func (c *Context) Close() {
	if c == nil {
		return
	}
	if c.c != nil {
		C.llama_free(c.c)
		c.c, c.memory = nil, nil
	}
	c.abortLock.Lock()
	defer c.abortLock.Unlock()
	if c.abort != nil {
		C.free(unsafe.Pointer(c.abort))
		c.abort = nil
	}
}

// Tokens is the number of cells of the key-value cache.
func (c *Context) Tokens() int { return c.tokens }

// BatchTokens is the most tokens that one Decode takes.
func (c *Context) BatchTokens() int { return c.batch }

// ResetAbort forgets an Abort that came too late for the Decode it was meant for.
func (c *Context) ResetAbort() {
	c.abortLock.Lock()
	defer c.abortLock.Unlock()
	if c.abort != nil {
		C.hone_abort_set(c.abort, 0)
	}
}

// Abort makes the running Decode return engine.ErrAborted soon, between two operations of the graph, and every later one
// until ResetAbort. Any goroutine may call it. It works on the CPU only.
func (c *Context) Abort() {
	c.abortLock.Lock()
	defer c.abortLock.Unlock()
	if c.abort != nil {
		C.hone_abort_set(c.abort, 1)
	}
}

// Decode computes the rows of the batch on top of what its sequences hold in the cache and puts them there
// (llama_decode). It returns engine.ErrNoRoom, after which the cache is as before if the batch is one micro-batch,
// engine.ErrAborted, or an *engine.Error after which the sequences of the batch should be removed.
func (c *Context) Decode(b *Batch) error {
	clear(c.rows)
	switch {
	case c.c == nil || b.c.token == nil:
		return ErrClosed
	case b.Len() == 0:
		return errors.New("decode: the batch is empty")
	case b.Len() > c.batch:
		return fmt.Errorf("decode: the batch has %d tokens, more than %d", b.Len(), c.batch)
	}
	for i := range b.Len() {
		token, sequence := b.token[i], b.sequence[i]
		if token < 0 || int(token) >= c.model.size {
			return fmt.Errorf("decode: row %d has token %d, which is outside of the vocabulary", i, token)
		}
		if sequence < 0 || int(sequence) >= c.sequences {
			return fmt.Errorf("decode: row %d is of sequence %d, there are %d", i, sequence, c.sequences)
		}
	}
	code := C.llama_decode(c.c, b.c)
	switch {
	case code == 0:
		// A GPU may still be computing. Waiting for it here lets callers measure a batch, and costs nothing: its logits come next.
		c.submitted = time.Now()
		C.llama_synchronize(c.c)
		for i := range b.Len() {
			if b.logits[i] != 0 {
				c.rows[i] = true
			}
		}
		return nil
	case code == 1:
		return engine.ErrNoRoom
	case code == 2:
		return engine.ErrAborted
	}
	return &engine.Error{Op: "llama_decode", Code: int(code)}
}

// Logits returns the logits of row i of the last batch, one a token of the vocabulary (llama_get_logits_ith); nil
// if the row asked for none. They are the library's memory: valid until the next Decode, and not to be written.
func (c *Context) Logits(row int) []float32 {
	if c.c == nil || !c.rows[row] {
		return nil
	}
	p := C.llama_get_logits_ith(c.c, C.int32_t(row))
	if p == nil {
		return nil
	}
	return unsafe.Slice((*float32)(unsafe.Pointer(p)), c.model.size)
}

// SetEmbeddings says whether the following decodes also compute hidden states, for State (llama_set_embeddings).
func (c *Context) SetEmbeddings(on bool) {
	if c.c != nil && on != c.embeddings {
		C.llama_set_embeddings(c.c, C.bool(on))
		c.embeddings = on
	}
}

// State returns the last hidden state after the final norm of row i of the last batch, whose logits were asked for after
// SetEmbeddings (llama_get_embeddings_ith); nil otherwise. It is valid until the next Decode, and not to be written.
func (c *Context) State(row int) []float32 {
	if c.c == nil || !c.embeddings || !c.rows[row] {
		return nil
	}
	p := C.llama_get_embeddings_ith(c.c, C.int32_t(row))
	if p == nil {
		return nil
	}
	return unsafe.Slice((*float32)(unsafe.Pointer(p)), c.model.EmbeddingSize())
}

// RemoveSequence removes the tokens of a sequence from position first on; 0 removes all (llama_memory_seq_rm).
// It is false if the model's cache cannot drop a part (recurrent models): then nothing changed.
func (c *Context) RemoveSequence(sequence, first int) bool {
	if !c.has(sequence) || first < 0 {
		return false
	}
	return bool(C.llama_memory_seq_rm(c.memory, C.int32_t(sequence), C.int32_t(first), -1))
}

// CopySequence makes the first tokens of one sequence also the first tokens of another, empty one: they share the
// cells (llama_memory_seq_cp). It is false when the caches are separate.
func (c *Context) CopySequence(from, to, tokens int) bool {
	if !c.has(from) || !c.has(to) || from == to || c.separate || tokens <= 0 {
		return false
	}
	C.llama_memory_seq_cp(c.memory, C.int32_t(from), C.int32_t(to), 0, C.int32_t(tokens))
	return true
}

// KeepSequence removes every other sequence (llama_memory_seq_keep).
func (c *Context) KeepSequence(sequence int) {
	if c.has(sequence) {
		C.llama_memory_seq_keep(c.memory, C.int32_t(sequence))
	}
}

// SequenceTokens is the number of tokens of a sequence in the cache (llama_memory_seq_pos_max + 1).
func (c *Context) SequenceTokens(sequence int) int {
	if !c.has(sequence) {
		return 0
	}
	return int(C.llama_memory_seq_pos_max(c.memory, C.int32_t(sequence))) + 1
}

// Clear empties the cache (llama_memory_clear).
func (c *Context) Clear() {
	if c.c != nil {
		C.llama_memory_clear(c.memory, false)
	}
}

func (c *Context) has(sequence int) bool {
	return c.c != nil && sequence >= 0 && sequence < c.sequences
}

// Batch is the input of Decode: rows of one token each. Its memory is C's; Close frees it.
type Batch struct {
	c        C.struct_llama_batch
	capacity int
	token    []int32 // views of the C arrays
	position []int32
	logits   []int8
	sequence []int32 // Go's copy of what seq_id points to
}

// NewBatch allocates a batch for at most tokens rows (llama_batch_init with one sequence a row).
func NewBatch(tokens int) *Batch {
	if tokens <= 0 {
		panic(fmt.Sprintf("llama: batch of %d tokens", tokens))
	}
	b := &Batch{c: C.llama_batch_init(C.int32_t(tokens), 0, 1), capacity: tokens}
	b.token = unsafe.Slice((*int32)(unsafe.Pointer(b.c.token)), tokens)
	b.position = unsafe.Slice((*int32)(unsafe.Pointer(b.c.pos)), tokens)
	b.logits = unsafe.Slice((*int8)(unsafe.Pointer(b.c.logits)), tokens)
	b.sequence = make([]int32, tokens)
	for i := range tokens {
		unsafe.Slice(b.c.n_seq_id, tokens)[i] = 1
	}
	return b
}

// Close frees the batch (llama_batch_free). It may be called twice and on nil.
func (b *Batch) Close() {
	if b == nil || b.c.token == nil {
		return
	}
	C.llama_batch_free(b.c)
	b.c = C.struct_llama_batch{}
	b.token, b.position, b.sequence, b.logits = nil, nil, nil, nil
}

// Reset empties the batch.
func (b *Batch) Reset() { b.c.n_tokens = 0 }

// Len is the number of rows.
func (b *Batch) Len() int { return int(b.c.n_tokens) }

// Add appends a row: the token at a position of a sequence, whose logits can be read after Decode if asked for.
// It returns the row's number, or -1 if the batch is full or closed.
func (b *Batch) Add(token engine.Token, position, sequence int, logits bool) int {
	i := b.Len()
	if b.c.token == nil || i >= b.capacity {
		return -1
	}
	b.token[i], b.position[i], b.sequence[i], b.logits[i] = int32(token), int32(position), int32(sequence), 0
	*unsafe.Slice(b.c.seq_id, b.capacity)[i] = C.int32_t(sequence)
	if logits {
		b.logits[i] = 1
	}
	b.c.n_tokens++
	return i
}

// SetAdapter makes the following decodes use the adapter alone, its contribution scaled (llama_set_adapter_lora);
// nil means the base model. The cache holds what the adapter before computed: the caller decides what of it to remove.
func (c *Context) SetAdapter(a *Adapter, scale float32) error {
	if c.c == nil || a != nil && a.c == nil {
		return ErrClosed
	}
	if a != nil && a.model != c.model {
		return errors.New("set adapter: it was loaded for another model")
	}
	if a == c.adapter && (a == nil || scale == c.scale) {
		return nil
	}
	C.llama_clear_adapter_lora(c.c)
	c.adapter, c.scale = nil, 0
	if a != nil {
		if code := C.llama_set_adapter_lora(c.c, a.c, C.float(scale)); code != 0 {
			return &engine.Error{Op: "llama_set_adapter_lora", Code: int(code)}
		}
		c.adapter, c.scale = a, scale
	}
	return nil
}
