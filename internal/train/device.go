package train

import (
	"github.com/hone-llm/hone/internal/ggml"
)

// openBackend opens the device that the plan was made for.
func (t *trainer) openBackend() (*ggml.Backend, error) { return ggml.NewCPU(t.threads) }
