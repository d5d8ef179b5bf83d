package graph

import (
	"fmt"
	"strings"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// Types of weights beside ggml's own.
const (
	// Packed is block floating point (ggml.PackedBytes), for the CPU's custom product.
	Packed ggml.Type = -1
	// Stored takes no memory but the file's pages, which are shared with everybody who maps it: the CPU packs a matrix
	// whenever it multiplies with it or with its transpose, and so computes the same as Packed, bit for bit.
	Stored ggml.Type = -2
)

// Layout says how the weights are stored: Forward those that the forward pass multiplies, Backward their transposes;
// each F32, BF16, Packed or Stored; on GPUs also as in plain_weights.go.
type Layout struct{ Forward, Backward ggml.Type }

// LayoutNames are those that LayoutOf knows, from the fastest to the smallest.
var LayoutNames = []string{"exact", "middle", "low"}

// LayoutOf finds the layout of a memory plan, on the CPU or on a GPU. On a CPU with AVX512-VNNI:
//
//	name    weights        bytes a weight   time of a step   gradients of the default model, worst and mean error
//	exact   packed/packed  4.12             1                0.7%, 0.3%
//	middle  packed/stored  2.06             1.07             the same bits
//	low     stored/stored  0                1.13             the same bits
//	        f32/bf16       6                1.78             1.4%, 0.6%: the exact layout where there is BF16 but no VNNI
//	        bf16/bf16      4                1.26             4.2%, 1.9%
//
// to which come the pages of the mapped file where weights are stored, and its head packed for the time of a step. The
// processor time is that of 960 tokens (BenchmarkLayouts); packing takes as long for fewer. So the plans differ in nothing
// but memory and speed, on a GPU as well, where middle and low are the same layout.
func LayoutOf(name string, gpu bool) (Layout, error) {
	switch {
	case name == "exact" && gpu:
		return DeviceLayout(), nil
	case name == "exact":
		return ExactLayout(), nil
	case (name == "middle" || name == "low") && gpu:
		return DeviceStoredLayout(), nil
	case name == "middle":
		return Layout{Packed, Stored}, nil
	case name == "low":
		return Layout{Stored, Stored}, nil
	}
	return Layout{}, fmt.Errorf("memory plan %q: expected one of %s", name, strings.Join(LayoutNames, ", "))
}

// ExactLayout is the default: activations and losses are those of the weights as served, and gradients are off by far
// less than the base model's own rounding.
func ExactLayout() Layout {
	switch {
	case ggml.HasVNNI():
		return Layout{Packed, Packed}
	case ggml.HasBF16():
		return Layout{ggml.F32, ggml.BF16}
	}
	return Layout{ggml.F32, ggml.F32}
}

var storageNames = map[ggml.Type]string{Packed: "packed", Stored: "stored"}

func storageName(t ggml.Type) string {
	if name, ok := storageNames[t]; ok {
		return name
	}
	return gguf.Type(t).String()
}

// String is the layout as ParseLayout reads it, such as packed/packed: forward, then backward.
func (l Layout) String() string { return storageName(l.Forward) + "/" + storageName(l.Backward) }

// ParseLayout reads what Layout.String wrote, into a resume state for instance.
func ParseLayout(text string) (Layout, error) {
	forward, backward, _ := strings.Cut(text, "/")
	var l Layout
	for i, name := range []string{forward, backward} {
		found := false
		for _, t := range []ggml.Type{ggml.F32, ggml.F16, ggml.BF16, Packed, Stored} {
			if storageName(t) == name {
				*[]*ggml.Type{&l.Forward, &l.Backward}[i], found = t, true
			}
		}
		if !found {
			return Layout{}, fmt.Errorf("layout %q: %q is no storage of weights", text, name)
		}
	}
	return l, nil
}
