package graph

import (
	"fmt"
	"sync"

	"github.com/hone-llm/hone/internal/ggml"
)

// maskPool is the number of different dropout masks. A token takes one of them for each module, so that two tokens
// share a module's mask with probability 1/1024, and hardly ever all modules'.
const maskPool = 1024

// masks is the pool, on the device: float32 [width, maskPool], 1/(1-p) with probability 1-p and else 0. It depends on
// p alone, so that a resumed run finds the same masks.
type masks struct {
	mu      sync.Mutex // of make
	p       float64
	pool    ggml.Tensor
	context *ggml.Context
	buffer  *ggml.Buffer
}

// make makes the pool for a dropout of p on modules of at most width inputs, or keeps the one that is there.
func (m *masks) make(backend *ggml.Backend, dropout float64, width int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pool.Valid() && m.p == dropout && m.pool.Size(0) >= width {
		return nil
	}
	m.free()
	context := ggml.NewContext(1, 0)
	pool := context.New(ggml.F32, width, maskPool)
	buffer, err := context.Allocate(backend)
	if err != nil {
		context.Free()
		return fmt.Errorf("dropout masks: %w", err)
	}
	m.p, m.pool, m.context, m.buffer = dropout, pool, context, buffer
	kept := float32(1 / (1 - dropout))
	threshold := uint32(dropout * (1 << 32))
	row := make([]float32, width)
	for i := range maskPool {
		for j := range row {
			row[j] = 0
			if uint32(mix(uint64(i)<<32|uint64(j))>>32) >= threshold {
				row[j] = kept
			}
		}
		pool.SetFloatsAt(row, i*width)
	}
	return nil
}

func (m *masks) free() {
	m.buffer.Free()
	m.context.Free()
	m.pool, m.context, m.buffer = ggml.Tensor{}, nil, nil
}

// maskRow is the mask of a token's seed in a module.
func maskRow(seed uint32, module int) int32 {
	return int32(mix(uint64(module)<<32|uint64(seed)) % maskPool)
}

// mix is the output function of splitmix64, https://doi.org/10.1145/2714064.2660195.
func mix(z uint64) uint64 {
	z += 0x9E3779B97F4A7C15
	z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
	z = (z ^ z>>27) * 0x94D049BB133111EB
	return z ^ z>>31
}
