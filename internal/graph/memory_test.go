package graph_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/modeltest"
)

// TestEstimate compares the estimate with what is taken, and that of the activations to the byte.
func TestEstimate(t *testing.T) {
	path := modeltest.Path(t)
	file, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	backend, err := ggml.NewCPU(2)
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	exact, stored := graph.ExactLayout(), graph.Layout{Forward: graph.Stored, Backward: graph.Stored}
	for _, test := range []struct {
		layout    graph.Layout
		recompute bool
		modules   []graph.Module
		layers    []int
		batch     engine.Batch
	}{
		{exact, false, graph.AllLinear, nil, graph.WorstBatch(96, 50, 96)},
		{exact, true, graph.AllLinear, nil, graph.WorstBatch(96, 50, 96)},
		{stored, false, []graph.Module{graph.Query, graph.Value}, nil, graph.WorstBatch(64, 64, 2)},
		{stored, true, []graph.Module{graph.Down}, []int{28, 29}, graph.WorstBatch(64, 64, 2)},
	} {
		t.Run(fmt.Sprintf("%s recompute %v", test.layout, test.recompute), func(t *testing.T) {
			options := graph.LoRAOptions{Rank: 8, Alpha: 16, Dropout: 0.05, Modules: test.modules, Layers: test.layers}
			want, err := graph.Estimate(file, backend, test.layout, options, test.recompute, test.batch)
			if err != nil {
				t.Fatal(err)
			}
			before := resident(t)
			m, err := graph.Load(file, backend, test.layout)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			m.Recompute = test.recompute
			lora := adapter(t, m, options)
			if _, err := m.Gradients(test.batch, lora, 1); err != nil {
				t.Fatal(err)
			}
			taken := resident(t) - before
			t.Logf("estimate %+v, %d MiB; %d MiB resident", want, want.Total()>>20, taken>>20)
			if got := m.ActivationBytes(); got > want.Activations || got < want.Activations-1<<20 { // the difference is the inputs
				t.Errorf("activations take %d bytes, estimated %d", got, want.Activations)
			}
			if got := 8 * len(lora.Parameters); got > want.Adapter || got < want.Adapter-1024 {
				t.Errorf("the adapter takes %d bytes, estimated %d", got, want.Adapter)
			}
			// What is resident also holds scratch memory and whatever else the process allocated and has not returned.
			if taken > want.Total()+want.Total()/10+16<<20 {
				t.Errorf("%d bytes became resident, estimated %d", taken, want.Total())
			}
		})
	}
}

// resident is the process's memory in use, in bytes.
func resident(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Skip("/proc/self/status has no VmRSS")
	return 0
}

// TestMemoryShortage expects a micro-batch that does not fit to leave the model as it was.
func TestMemoryShortage(t *testing.T) {
	m := load(t, testModels(t)[0], graph.ExactLayout())
	lora := adapter(t, m, graph.LoRAOptions{Rank: 4, Alpha: 8, Modules: graph.AllLinear})
	small := sample(m.Vocabulary, 5, 20, 30)
	want, _ := gradients(t, m, lora, small)
	limit := m.ActivationBytes() + 1<<20
	m.LimitActivations(limit)
	for range 2 {
		large := sample(m.Vocabulary, 2000, 2000, 1000)
		before := slices.Clone(lora.Gradients)
		if _, err := m.Gradients(large, lora, 1); !errors.Is(err, ggml.ErrMemory) {
			t.Fatalf("got %v, want ErrMemory", err)
		}
		if !slices.Equal(before, lora.Gradients) {
			t.Error("the gradients changed")
		}
		if got, _ := gradients(t, m, lora, small); !slices.Equal(want, got) {
			t.Error("other gradients than before")
		}
		if m.ActivationBytes() > limit {
			t.Errorf("%d bytes of activations, at most %d are allowed", m.ActivationBytes(), limit)
		}
	}
	m.LimitActivations(0)
	if _, err := m.Gradients(sample(m.Vocabulary, 200, 500), lora, 1); err != nil {
		t.Error(err)
	}
}
