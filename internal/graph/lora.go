package graph

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/hone-llm/hone/internal/ggml"
)

// Module is one of the seven linear layers of a transformer block.
type Module int

// The modules in the order of the LoRA tensors.
const (
	Query Module = iota
	Key
	Value
	Output
	Gate
	Up
	Down
	modules
)

// AllLinear is every module, PEFT's "all-linear".
var AllLinear = []Module{Query, Key, Value, Output, Gate, Up, Down}

var moduleNames = [modules][2]string{
	{"q_proj", "attn_q"}, {"k_proj", "attn_k"}, {"v_proj", "attn_v"}, {"o_proj", "attn_output"},
	{"gate_proj", "ffn_gate"}, {"up_proj", "ffn_up"}, {"down_proj", "ffn_down"},
}

// String is the module's name in Hugging Face models and in PEFT's target_modules.
func (m Module) String() string { return moduleNames[m][0] }

// TensorName is the module's name in GGUF files, without "blk.N." and ".weight".
func (m Module) TensorName() string { return moduleNames[m][1] }

// ParseModule finds a module by its Hugging Face name.
func ParseModule(name string) (Module, error) {
	for m := range modules {
		if m.String() == name {
			return m, nil
		}
	}
	return 0, fmt.Errorf("target module %q is unknown: expected some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or all-linear", name)
}

func (s Shape) moduleSize(m Module) (in, out int) {
	d, q, kv := s.Embedding, s.Heads.Query*s.Heads.Size, s.Heads.KeyValue*s.Heads.Size
	switch m {
	case Query:
		return d, q
	case Key, Value:
		return d, kv
	case Output:
		return q, d
	case Down:
		return s.FeedForward, d
	default:
		return d, s.FeedForward
	}
}

// LoRAOptions describe the adapter to train, https://arxiv.org/abs/2106.09685.
type LoRAOptions struct {
	Rank      int
	Alpha     float64
	RankScale bool // rsLoRA: the scale is alpha/sqrt(rank) instead of alpha/rank, https://arxiv.org/abs/2312.03732
	Dropout   float64
	Modules   []Module
	Layers    []int // PEFT's layers_to_transform; empty trains all
}

// Scale multiplies B A x.
func (o LoRAOptions) Scale() float64 {
	if o.RankScale {
		return o.Alpha / math.Sqrt(float64(o.Rank))
	}
	return o.Alpha / float64(o.Rank)
}

// Part is one trained matrix pair inside a LoRA's flat arrays. The rank is padded to a multiple of 16 (of 8
// on a GPU); the padding rows are and stay 0, and so do their gradients.
type Part struct {
	Layer   int
	Module  Module
	In, Out int
	A, B    int // offsets of A [padded rank, In] and of B transposed [padded rank, Out]
}

// LoRA holds an adapter's weights and gradients, each as one flat float32 array. Close frees it.
type LoRA struct {
	LoRAOptions
	Parts                 []Part // by layer, then module
	PaddedRank            int
	Parameters, Gradients []float32 // memory of the backend: valid until Close

	parameters, gradients ggml.Tensor
	context               *ggml.Context
	buffer                *ggml.Buffer

	model *Model
	apart [2]*ggml.Buffer // of Parameters and Gradients where the host cannot reach the device's memory
	host  bool
}

// NewLoRA allocates an adapter whose weights are all 0.
func (m *Model) NewLoRA(o LoRAOptions) (*LoRA, error) {
	l, err := m.describeLoRA(o)
	if err != nil {
		return nil, err
	}
	if l.buffer, err = l.context.Allocate(m.backend); err != nil {
		l.Close()
		return nil, fmt.Errorf("adapter of rank %d: %w", o.Rank, err)
	}
	if l.host {
		l.Parameters, l.Gradients = l.parameters.Floats(), l.gradients.Floats()
		clear(l.Parameters)
		clear(l.Gradients)
	} else {
		size := l.parameters.Elements()
		l.Parameters, l.apart[0] = m.backend.HostFloats(size)
		l.Gradients, l.apart[1] = m.backend.HostFloats(size)
	}
	return l, nil
}

// describeLoRA lays an adapter out; it has no memory yet.
func (m *Model) describeLoRA(o LoRAOptions) (*LoRA, error) {
	if o.Rank < 1 || o.Rank > 256 {
		return nil, fmt.Errorf("rank %d: expected 1 to 256", o.Rank)
	}
	if o.Dropout < 0 || o.Dropout >= 1 {
		return nil, fmt.Errorf("dropout %g: expected at least 0 and less than 1", o.Dropout)
	}
	gpu := m.backend.GPU()
	l := &LoRA{LoRAOptions: o, model: m, PaddedRank: paddedRank(o.Rank), host: !gpu}
	if gpu {
		l.PaddedRank = (o.Rank + 7) / 8 * 8
	}
	l.Modules = slices.Compact(slices.Sorted(slices.Values(o.Modules)))
	layers := slices.Compact(slices.Sorted(slices.Values(o.Layers)))
	if len(layers) == 0 {
		for layer := range m.layers {
			layers = append(layers, layer)
		}
	}
	if first, last := layers[0], layers[len(layers)-1]; first < 0 || last >= len(m.layers) {
		return nil, fmt.Errorf("layers %d to %d: the model has layers 0 to %d", first, last, len(m.layers)-1)
	}
	if len(l.Modules) == 0 {
		return nil, errors.New("no modules to train")
	}
	size := 0
	for _, layer := range layers {
		for _, module := range l.Modules {
			in, out := m.moduleSize(module)
			l.Parts = append(l.Parts, Part{layer, module, in, out, size, size + l.PaddedRank*in})
			size += l.PaddedRank * (in + out)
		}
	}
	l.context = ggml.NewContext(2, 0)
	l.parameters, l.gradients = l.context.New(ggml.F32, size), l.context.New(ggml.F32, size)
	return l, nil
}

func paddedRank(rank int) int { return (rank + 15) / 16 * 16 }

// Close frees the adapter's memory; it may be called twice.
func (l *LoRA) Close() {
	if l != nil {
		l.model.dropAhead()
		l.buffer.Free()
		l.apart[0].Free()
		l.apart[1].Free()
		l.context.Free()
	}
}

// toDevice copies Parameters, and with gradients Gradients, to where the graph uses them; fromDevice copies Gradients
// back. Each is one transfer.
func (l *LoRA) toDevice(gradients bool) {
	if l == nil || l.host {
		return
	}
	l.parameters.SetFloats(l.Parameters)
	if gradients {
		l.gradients.SetFloats(l.Gradients)
	}
}

func (l *LoRA) fromDevice() {
	if !l.host {
		l.gradients.GetFloats(l.Gradients)
	}
}

// Matrices copies one pair out of a flat array (Parameters or Gradients) in PEFT's shapes, without the padding:
//
//	a [Rank, In], b [Out, Rank], row-major; rows of b in the order of the model file
func (l *LoRA) Matrices(flat []float32, p Part) (a, b []float32) {
	a = slices.Clone(flat[p.A : p.A+l.Rank*p.In])
	b = make([]float32, p.Out*l.Rank)
	for r := range l.Rank {
		for o, v := range flat[p.B+r*p.Out : p.B+(r+1)*p.Out] {
			b[o*l.Rank+r] = v
		}
	}
	return a, b
}

// SetMatrices is the inverse of Matrices on Parameters.
func (l *LoRA) SetMatrices(p Part, a, b []float32) {
	copy(l.Parameters[p.A:p.A+l.Rank*p.In], a)
	for r := range l.Rank {
		row := l.Parameters[p.B+r*p.Out : p.B+(r+1)*p.Out]
		for o := range row {
			row[o] = b[o*l.Rank+r]
		}
	}
}

// part returns the pair of a layer's module, if it is trained.
func (l *LoRA) part(layer int, m Module) (Part, bool) {
	if l == nil {
		return Part{}, false
	}
	i, ok := slices.BinarySearchFunc(l.Parts, Part{Layer: layer, Module: m}, func(a, b Part) int {
		return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Module, b.Module))
	})
	if !ok {
		return Part{}, false
	}
	return l.Parts[i], true
}

// trains reports whether one of the modules of a layer is trained.
func (l *LoRA) trains(layer int, any ...Module) bool {
	return slices.ContainsFunc(any, func(m Module) bool { _, ok := l.part(layer, m); return ok })
}

// lowest is the lowest layer that is trained: no gradient is needed below.
func (l *LoRA) lowest() int { return l.Parts[0].Layer }
