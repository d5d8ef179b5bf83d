// Command peak measures how fast this machine multiplies matrices with the engine's own kernels, at sizes where nothing
// but the kernel counts: the ceiling that a training step is compared with.
//
//	go run ./scripts/bench/peak -seconds 6 -threads 2
//
// It prints one JSON object: by kind of weights (f32, bf16, packed), the median and the best of the rounds in GF/s (2 x inputs
// x outputs x tokens operations each). Kinds take turns, so that a disturbance meets all of them.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/hone-llm/hone/internal/ggml"
)

// The linear layer that is multiplied: the feed-forward of a model of 1.5 billion weights, 1,024 tokens at once.
const inputs, outputs, tokens = 1536, 8960, 1024

// kind is one way to store the weights.
type kind struct {
	name  string
	graph *ggml.Graph
	rates []float64 // GF/s of each round
}

func main() {
	seconds := flag.Float64("seconds", 6, "how long to measure")
	threads := flag.Int("threads", runtime.NumCPU(), "threads")
	flag.Parse()
	rates, err := measure(*threads, time.Duration(*seconds*float64(time.Second)))
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(rates)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "peak:", err)
		os.Exit(1)
	}
}

// rate is the speed of one kind in GF/s.
type rate struct {
	Median float64 `json:"median"`
	Best   float64 `json:"best"`
}

func measure(threads int, duration time.Duration) (map[string]rate, error) {
	backend, err := ggml.NewCPU(threads)
	if err != nil {
		return nil, err
	}
	defer backend.Close()
	x := ggml.NewContext(32, 256)
	defer x.Free()
	weights, columns := wave(inputs*outputs), wave(inputs*tokens)

	v := x.New(ggml.F32, inputs, tokens)
	fills := []func(){func() { v.SetRows(columns, 0) }}
	graphOf := func(nodes ...ggml.Tensor) *ggml.Graph {
		g := x.NewGraph(16)
		for _, node := range nodes {
			g.Add(node)
		}
		return g
	}
	plain := func(t ggml.Type) *ggml.Graph {
		w := x.New(t, inputs, outputs)
		fills = append(fills, func() { w.SetRows(weights, 0) })
		return graphOf(x.MulMat(w, v))
	}
	kinds := []*kind{{name: "f32", graph: plain(ggml.F32)}}
	if ggml.HasBF16() {
		kinds = append(kinds, &kind{name: "bf16", graph: plain(ggml.BF16)})
	}
	if ggml.HasVNNI() {
		w := x.New(ggml.I8, ggml.PackedBytes(inputs, outputs))
		fills = append(fills, func() { w.SetPackedRows(weights, 0, inputs, outputs) })
		q := x.Quantize(v)
		kinds = append(kinds, &kind{name: "packed", graph: graphOf(q, x.PackedMatMul(w, q, ggml.Tensor{}, inputs, outputs, tokens))})
	}
	buffer, err := x.Allocate(backend)
	if err != nil {
		return nil, err
	}
	defer buffer.Free()
	for _, fill := range fills {
		fill()
	}
	allocator := backend.NewAllocator()
	defer allocator.Free()
	const flops = 2.0 * inputs * outputs * tokens
	for began := time.Now(); time.Since(began) < duration || len(kinds[0].rates) < 4; {
		for _, k := range kinds {
			start := time.Now()
			if err := backend.Compute(k.graph, allocator); err != nil {
				return nil, err
			}
			k.rates = append(k.rates, flops/time.Since(start).Seconds()/1e9)
		}
	}
	result := map[string]rate{}
	for _, k := range kinds {
		rates := k.rates[1:] // the first meets cold memory
		slices.Sort(rates)
		result[k.name] = rate{Median: rates[len(rates)/2], Best: rates[len(rates)-1]}
	}
	return result, nil
}

// wave returns n values of about the size of normalised activations, none of them special.
func wave(n int) []float32 {
	values := make([]float32, n)
	for i := range values {
		values[i] = float32(math.Sin(float64(i)*0.7) + 0.3*math.Cos(float64(i)*1.9))
	}
	return values
}
