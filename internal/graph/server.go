package graph

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// ServerOptions of NewServer.
type ServerOptions struct {
	Threads     int       // 0: all cores
	Sequences   int       // sequence numbers; 0: 8
	CacheTokens int       // cells of the key-value cache, for all sequences together; 0: the trained context for each sequence
	CacheType   ggml.Type // of keys and values: ggml.F16 (also 0) or ggml.Q8_0
	BatchTokens int       // most tokens of one Decode; 0: 512
}

// Server computes batches of several sequences on the CPU for serving, each row with its own adapter: an
// engine.Decoder.
//
//	server, err := graph.NewServer(file, graph.ServerOptions{Sequences: 8, CacheTokens: 16384})
//	err = server.Decode([]engine.Part{{Sequence: 0, Tokens: prompt, Want: engine.WantLast}})
//	logits := server.Output(0, 0)
//
// What a token gets depends on the tokens before it in its own sequence and on its adapter alone, bit for bit: not on
// the other parts of a batch, on how a prompt is cut into parts, on what was shared, or on the number of threads. So greedy
// text is the same alone and in a full batch.
//
// Weights that the file stores with 4 to 8 bits keep their codes (ggml.Repacked) and are multiplied with activations
// rounded to int8, as llama.cpp does; float weights are Packed. Keys and values lie in pages (serverCache).
type Server struct {
	shape   Shape
	options ServerOptions
	paged   ggml.Paged
	file    *gguf.File // for the rows of the embedding
	crew    *ggml.Crew

	weights     *ggml.Context
	layers      []servedLayer
	norm        ggml.Tensor
	head        servedMatrix
	ropeFactors ggml.Tensor
	embedding   gguf.Tensor
	fills       []func()

	forget []gguf.Tensor // repacked: their pages are given back

	cache    serverCache
	caches   *ggml.Context // the layers' pages
	inputs   *ggml.Context
	in       serverInputs
	slots    [slotCount]slot
	programs map[programKey]*serverProgram
	recent   []programKey // of the large programs that are kept
	memory   []mapping

	batch serverBatch
	keys  []programKey         // of the batch
	costs map[string]ggml.Cost // of the running Profile
	lock  sync.Mutex           // of adapters' use
}

// ServerMemory is what a server takes, in bytes.
type ServerMemory struct {
	Weights     int
	Cache       int // touched as it is used
	Activations int // of the largest batch, with the logits of one token a sequence; 4 bytes x vocabulary for each more
	Mapped      int // the embedding's pages in the file, of which the rows of seen tokens are in memory
}

// Total is the sum.
func (m ServerMemory) Total() int { return m.Weights + m.Cache + m.Activations + m.Mapped }

// ServerBytes says what NewServer will take with the same arguments; its errors are NewServer's.
func ServerBytes(f *gguf.File, o ServerOptions) (ServerMemory, error) {
	s, err := describeServer(f, o)
	if err != nil {
		return ServerMemory{}, err
	}
	defer s.Close()
	return s.bytes(), nil
}

func (s *Server) bytes() ServerMemory {
	m := ServerMemory{Cache: s.cacheBytes(), Mapped: int(s.embedding.Bytes), Weights: s.weights.MemoryBytes(), Activations: s.inputs.MemoryBytes() + 4*s.shape.Vocabulary*s.options.Sequences}
	for i, slot := range s.slots {
		if i != int(slotLogits) {
			m.Activations += slot.bytes
		}
	}
	return m
}

func (s *Server) cacheBytes() int { return s.shape.Layers * s.cache.total() * s.paged.PageBytes() }

// NewServer loads a model for serving; f may be closed afterwards. A model that cannot be served like this gives
// *UnsupportedError before memory is allocated. Close frees it.
func NewServer(f *gguf.File, o ServerOptions) (*Server, error) {
	s, err := describeServer(f, o)
	if err != nil {
		return nil, err
	}
	if err := s.allocate(); err != nil {
		s.Close()
		return nil, err
	}
	inParallel(s.fills)
	for _, t := range s.forget {
		s.file.Forget(t)
	}
	s.fills, s.forget = nil, nil
	return s, nil
}

// describeServer lays everything out; nothing has memory yet.
func describeServer(f *gguf.File, o ServerOptions) (*Server, error) {
	shape, err := ReadShape(f)
	if err != nil {
		return nil, err
	}
	if o.Threads <= 0 {
		o.Threads = runtime.NumCPU()
	}
	if o.Sequences <= 0 {
		o.Sequences = 8
	}
	if o.CacheTokens <= 0 {
		o.CacheTokens = shape.ContextTokens * o.Sequences
	}
	if o.BatchTokens <= 0 {
		o.BatchTokens = 512
	}
	if o.CacheType == 0 {
		o.CacheType = ggml.F16
	}
	switch {
	case o.CacheType != ggml.F16 && o.CacheType != ggml.Q8_0:
		return nil, &UnsupportedError{"cache type", fmt.Sprintf("%s, expected f16 or q8_0", gguf.Type(o.CacheType))}
	case o.CacheType == ggml.Q8_0 && shape.Heads.Size%32 != 0:
		return nil, &UnsupportedError{"cache type", fmt.Sprintf("q8_0 needs heads of a multiple of 32 elements, these have %d", shape.Heads.Size)}
	case o.CacheTokens > math.MaxInt32/2 || o.BatchTokens > 1<<15 || o.Sequences > 1<<16:
		return nil, fmt.Errorf("a cache of %d tokens, batches of %d and %d sequences: expected at most %d, 32768 and 65536", o.CacheTokens, o.BatchTokens, o.Sequences, math.MaxInt32/2)
	}
	s := &Server{shape: shape, options: o, paged: ggml.Paged{Heads: shape.Heads, Q8: o.CacheType == ggml.Q8_0}, programs: make(map[programKey]*serverProgram)}
	if s.file, err = gguf.Open(f.Path); err != nil {
		return nil, err
	}
	if err := s.describeWeights(); err != nil {
		s.Close()
		return nil, err
	}
	s.cache.describe(o.CacheTokens, o.Sequences)
	s.describeInputs()
	s.measure()
	return s, nil
}

func (s *Server) allocate() error {
	var err error
	for _, x := range []*ggml.Context{s.weights, s.inputs} {
		m, err := reserve(x.MemoryBytes())
		if err != nil {
			return err
		}
		s.memory = append(s.memory, m)
		if x == s.weights {
			ggml.HugePages(m) // 1.2 to 1.5 times the tokens of a decode step: see RATIONALE.md
		}
		x.Place(m)
	}
	for i := range s.slots {
		if s.slots[i].memory, err = reserve(s.slots[i].bytes); err != nil {
			return err
		}
		s.memory = append(s.memory, s.slots[i].memory)
	}
	all, err := reserve(s.cacheBytes())
	if err != nil {
		return err
	}
	s.memory = append(s.memory, all)
	bytes := s.cache.total() * s.paged.PageBytes()
	for i := range s.layers {
		s.layers[i].pages = all[i*bytes : (i+1)*bytes]
		s.layers[i].cache.SetMemory(s.layers[i].pages)
	}
	s.cache.allocate(s.in.tables.Ints(), func(from, to int32) {
		for i := range s.layers {
			s.paged.CopyPage(s.layers[i].pages, from, to)
		}
	})
	s.crew, err = ggml.NewCrew(s.options.Threads)
	return err
}

// Close frees the memory and ends the threads; it may be called twice. Adapters may be closed before or after.
func (s *Server) Close() {
	if s == nil {
		return
	}
	s.crew.Close()
	for key, p := range s.programs {
		p.context.Free()
		delete(s.programs, key)
	}
	s.weights.Free()
	s.inputs.Free()
	s.caches.Free()
	for _, m := range s.memory {
		m.release()
	}
	s.memory = nil
	s.file.Close()
}

// Limits are those of the options.
func (s *Server) Limits() engine.Limits {
	return engine.Limits{
		Sequences: s.options.Sequences, CacheTokens: s.options.CacheTokens, BatchTokens: s.options.BatchTokens,
		Vocabulary: s.shape.Vocabulary, Embedding: s.shape.Embedding, MixedAdapters: true,
	}
}

// Share lets `to` hold the first n tokens of `from`: whole pages are shared, and so is the last one until one of the two
// grows, which copies it.
func (s *Server) Share(from, to engine.Sequence, n int) bool {
	return s.cache.has(from) && s.cache.has(to) && s.cache.share(from, to, n)
}

// Truncate keeps the first n tokens of a sequence.
func (s *Server) Truncate(sequence engine.Sequence, n int) bool {
	if !s.cache.has(sequence) || n < 0 {
		return false
	}
	s.cache.truncate(sequence, n)
	return true
}

// FreeTokens is how many more tokens fit, whichever sequences they are for.
func (s *Server) FreeTokens() int { return min(s.options.CacheTokens, s.cache.free()) }

// Abort makes Decode return engine.ErrAborted after the current operation, less than a few milliseconds.
func (s *Server) Abort() { s.crew.Stop(true) }

// ResetAbort forgets an Abort.
func (s *Server) ResetAbort() { s.crew.Stop(false) }

// Decode computes a batch: see engine.Decoder.
func (s *Server) Decode(parts []engine.Part) error {
	s.batch.outputs = s.batch.outputs[:0]
	if err := s.check(parts); err != nil {
		return err
	}
	sites, release, err := s.use(parts)
	if err != nil {
		return err
	}
	defer release()
	if err := s.cache.extend(parts); err != nil {
		return err
	}
	s.plan(parts, sites)
	err = s.compute()
	if errors.Is(err, ggml.ErrAborted) {
		err = engine.ErrAborted
	}
	if err != nil {
		s.batch.outputs = s.batch.outputs[:0]
	}
	return err
}

func (s *Server) check(parts []engine.Part) error {
	tokens := 0
	for i, p := range parts {
		switch {
		case !s.cache.has(p.Sequence):
			return fmt.Errorf("decode: part %d is of sequence %d, there are %d", i, p.Sequence, s.options.Sequences)
		case len(p.Tokens) == 0:
			return fmt.Errorf("decode: part %d has no tokens", i)
		case p.Position != s.cache.length(p.Sequence):
			return fmt.Errorf("decode: part %d is at position %d, but sequence %d holds %d tokens", i, p.Position, p.Sequence, s.cache.length(p.Sequence))
		case slices.ContainsFunc(parts[:i], func(q engine.Part) bool { return q.Sequence == p.Sequence }):
			return fmt.Errorf("decode: sequence %d has two parts", p.Sequence)
		}
		for _, token := range p.Tokens {
			if token < 0 || int(token) >= s.shape.Vocabulary {
				return fmt.Errorf("decode: part %d has token %d, which is outside of the vocabulary of %d", i, token, s.shape.Vocabulary)
			}
		}
		tokens += len(p.Tokens)
	}
	if tokens == 0 || tokens > s.options.BatchTokens {
		return fmt.Errorf("decode: a batch of %d tokens, expected 1 to %d", tokens, s.options.BatchTokens)
	}
	return nil
}

// Output returns the logits or the state of the i-th wanted token of a part.
func (s *Server) Output(part, i int) []float32 {
	if part < 0 || part >= len(s.batch.outputs) {
		return nil
	}
	o := s.batch.outputs[part]
	if i < 0 || i >= o.n {
		return nil
	}
	if o.state {
		return rowOf(s.slots[slotStates], o.row+i, s.shape.Embedding)
	}
	return rowOf(s.slots[slotLogits], o.row+i, s.shape.Vocabulary)
}
