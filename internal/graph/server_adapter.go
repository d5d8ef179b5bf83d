package graph

import (
	"fmt"
	"strings"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// sites are the products of a layer that adapters change, as bits.
type sites uint8

const (
	siteQKV sites = 1 << iota
	siteOutput
	siteGateUp
	siteDown
	siteHead
)

func siteOf(m Module) sites {
	switch m {
	case Query, Key, Value:
		return siteQKV
	case Output:
		return siteOutput
	case Gate, Up:
		return siteGateUp
	}
	return siteDown
}

// servedAdapter is a LoRA adapter beside the weights. Close frees it, at the latest when the running Decode has ended.
type servedAdapter struct {
	server *Server
	pairs  *ggml.Pairs
	sites  sites
	users  int // Decode
	closed bool
}

// LoadAdapter reads an adapter.gguf that fits the model. Any goroutine may call it, also during Decode. A B A x is scaled by
// alpha / rank, or not at all if alpha is 0, as llama.cpp does.
func (s *Server) LoadAdapter(path string) (engine.Adapter, error) {
	f, err := gguf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load adapter: %w", err)
	}
	defer f.Close()
	if err := gguf.CheckAdapter(f, s.file); err != nil {
		return nil, fmt.Errorf("load adapter: %w", err)
	}
	alpha, _ := f.Metadata.Float("adapter.lora.alpha")
	a := &servedAdapter{server: s}
	pairs := make([]ggml.Pair, s.shape.Layers*int(modules)+1)
	read := 0
	pair := func(p *ggml.Pair, name string, in, out int, site sites) error {
		p.In, p.Out = in, out
		ta, ok := f.Tensor(name + gguf.SuffixA)
		if !ok {
			return nil
		}
		tb, _ := f.Tensor(name + gguf.SuffixB)
		if p.A, err = f.Floats(ta); err != nil {
			return err
		}
		if p.B, err = f.Floats(tb); err != nil {
			return err
		}
		p.Rank, p.Scale = int(ta.Shape[1]), 1
		if alpha != 0 {
			p.Scale = float32(alpha) / float32(p.Rank)
		}
		a.sites |= site
		read += 2
		return nil
	}
	for layer := range s.shape.Layers {
		for m := range modules {
			in, out := s.shape.moduleSize(m)
			if err := pair(&pairs[layer*int(modules)+int(m)], fmt.Sprintf("blk.%d.%s.weight", layer, m.TensorName()), in, out, siteOf(m)); err != nil {
				return nil, fmt.Errorf("load adapter: %w", err)
			}
		}
	}
	head := &pairs[len(pairs)-1]
	if err := pair(head, "output.weight", s.shape.Embedding, s.shape.Vocabulary, siteHead); err != nil {
		return nil, fmt.Errorf("load adapter: %w", err)
	}
	if head.Rank == 0 {
		head.Out = 0
	}
	if read != len(f.Tensors) {
		for _, t := range f.Tensors {
			name := strings.TrimSuffix(strings.TrimSuffix(t.Name, gguf.SuffixA), gguf.SuffixB)
			if !strings.HasPrefix(name, "blk.") && name != "output.weight" || strings.Contains(name, "norm") {
				return nil, fmt.Errorf("load adapter: %s: tensor %q: only linear layers can be adapted", path, t.Name)
			}
		}
		return nil, fmt.Errorf("load adapter: %s: %d of %d tensors belong to linear layers of the model", path, read, len(f.Tensors))
	}
	if a.pairs, err = ggml.NewPairs(pairs); err != nil {
		return nil, fmt.Errorf("load adapter %s: %w", path, err)
	}
	return a, nil
}

// Bytes is the memory of the weights.
func (a *servedAdapter) Bytes() int { return a.pairs.Bytes() }

// Close frees the weights; a running Decode that has them goes on.
func (a *servedAdapter) Close() {
	a.server.lock.Lock()
	defer a.server.lock.Unlock()
	if a.closed = true; a.users == 0 {
		a.pairs.Close()
	}
}

// use keeps the parts' adapters until release and returns the sites that they change.
func (s *Server) use(parts []engine.Part) (all sites, release func(), err error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	for i, p := range parts {
		if p.Adapter == nil {
			continue
		}
		a, ok := p.Adapter.(*servedAdapter)
		if !ok || a.server != s {
			return 0, nil, fmt.Errorf("decode: the adapter of part %d was not loaded here", i)
		}
		if a.closed {
			return 0, nil, fmt.Errorf("decode: the adapter of part %d is closed", i)
		}
		all |= a.sites
	}
	count := func(n int) {
		for _, p := range parts {
			if a, ok := p.Adapter.(*servedAdapter); ok {
				if a.users += n; a.users == 0 && a.closed {
					a.pairs.Close()
				}
			}
		}
	}
	count(1)
	return all, func() {
		s.lock.Lock()
		defer s.lock.Unlock()
		count(-1)
	}, nil
}
