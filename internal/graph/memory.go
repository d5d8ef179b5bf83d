package graph

import (
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// Memory is what training takes of the backend's memory, in bytes.
type Memory struct {
	Weights     int // of the base model, without those that stay in the file
	Mapped      int // of the file, of the pages that a step reads: in the process's memory, shared, and dropped when memory is short
	Adapter     int // weights and gradients
	Activations int // of the largest micro-batch, with its inputs
}

// Total is the sum.
func (m Memory) Total() int { return m.Weights + m.Mapped + m.Adapter + m.Activations }

// Estimate says what Load, NewLoRA and Gradients of the micro-batch (WorstBatch makes one) will take with these choices.
// It lays out the same tensors and plans the same graph without memory, in milliseconds, so that it is right to the byte
// but for the kernels' scratch memory, a few MiB for each thread. Its errors are Load's and NewLoRA's.
func Estimate(f *gguf.File, backend *ggml.Backend, layout Layout, o LoRAOptions, recompute bool, b engine.Batch) (Memory, error) {
	l, err := describe(f, backend, layout)
	if err != nil {
		return Memory{}, err
	}
	m := l.model
	defer m.Close()
	if err := b.Validate(m.Vocabulary); err != nil {
		return Memory{}, err
	}
	m.Recompute = recompute
	result := Memory{Weights: m.context.Measure(backend), Mapped: m.mappedBytes()}
	lora, err := m.describeLoRA(o)
	if err != nil {
		return Memory{}, err
	}
	defer lora.Close()
	result.Adapter = lora.context.Measure(backend)
	s, err := m.newStep(b, lora, true, 1, false)
	if err != nil {
		return Memory{}, err
	}
	defer s.free()
	result.Activations = s.inputs.Measure(backend) + m.blocks.memory()
	s.build()
	result.Activations += m.allocator.Measure(s.graph)
	return result, nil
}

// Reserve gives the activations the memory that Gradients of the micro-batch needs, so that no larger micro-batch than
// those before makes the allocator start over: new memory costs a page fault for each 4 KiB. It returns ggml.ErrMemory.
func (m *Model) Reserve(b engine.Batch, lora *LoRA) error {
	s, err := m.newStep(b, lora, true, 1, false)
	if err != nil {
		return err
	}
	defer s.free()
	s.build()
	return m.allocator.Reserve(s.graph)
}

// mappedBytes is the size of the tensors that stay in the file.
func (m *Model) mappedBytes() int {
	if m.backend.GPU() {
		return 0
	}
	bytes := 0
	for _, t := range m.file.Tensors {
		if len(t.Shape) == 2 && (m.Forward == Stored || m.Backward == Stored || t.Name == "token_embd.weight") {
			bytes += int(t.Bytes)
		}
	}
	return bytes
}

// WorstBatch is a micro-batch that takes as much memory as any of so many tokens, in rows of at most rowTokens, of which
// so many are predicted.
func WorstBatch(tokens, rowTokens, targets int) engine.Batch {
	b := engine.Batch{Tokens: make([]engine.Token, tokens), Seeds: make([]uint32, tokens)}
	for start := 0; start < tokens; start += rowTokens {
		b.Segments = append(b.Segments, engine.Segment{Start: start, End: min(start+rowTokens, tokens), Parent: -1})
	}
	for i := range min(targets, tokens) {
		b.Targets = append(b.Targets, engine.Target{Position: i, Weight: 1})
	}
	return b
}
