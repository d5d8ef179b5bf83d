package train

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/graph"
)

// chooseLayout takes the exact layout if it fits into the free memory, else the small one and says so, else it refuses
// with the numbers. A resumed job keeps what it had.
func (t *trainer) chooseLayout(shape graph.Shape, state *resumeState) (graph.Layout, error) {
	if state != nil {
		t.small = state.Small
	} else {
		free, err := freeMemory()
		if err != nil {
			return graph.Layout{}, err
		}
		rest := microTokens*shape.TokenBytes(t.plan.R) + 256<<20
		exact, small := shape.WeightBytes(graph.ExactLayout())+rest, shape.WeightBytes(graph.SmallLayout())+rest
		if small > free {
			return graph.Layout{}, &child.Error{
				Code:    "insufficient_memory",
				Message: fmt.Sprintf("training this model on the CPU takes %d MiB and %d MiB are free: free some memory or take a smaller base model", small>>20, free>>20),
				Param:   "model",
			}
		}
		if t.small = exact > free; t.small {
			if err := t.warn("Training in bfloat16, with gradients 2%% less exact: the exact layout takes %d MiB and %d MiB are free", exact>>20, free>>20); err != nil {
				return graph.Layout{}, err
			}
		}
	}
	if t.small {
		return graph.SmallLayout(), nil
	}
	return graph.ExactLayout(), nil
}

// freeMemory is the kernel's estimate of what can be allocated without swapping, in bytes.
func freeMemory() (int, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("free memory: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			if err != nil {
				return 0, fmt.Errorf("free memory: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("free memory: /proc/meminfo has no MemAvailable")
}
