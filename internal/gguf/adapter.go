package gguf

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Suffixes of the two tensors of a LoRA module, behind the name of the base model's tensor.
const (
	SuffixA = ".lora_a" // shape [in, r]
	SuffixB = ".lora_b" // shape [r, out]
)

// CheckAdapter checks that f is a LoRA adapter that the engine can load beside base: general.type, adapter.type and
// adapter.lora.alpha as the engine reads them, both halves of every pair, shapes that fit each other and the base's
// tensor, and finite weights. A nil base leaves out the comparison with it.
func CheckAdapter(f, base *File) error {
	c := &checker{f: f}
	m := f.Metadata
	for key, want := range map[string]string{"general.type": "adapter", "adapter.type": "lora"} {
		if got, ok := m.String(key); !ok || got != want {
			c.fail(keyName(key), "is %q, expected %q: this file is no LoRA adapter", got, want)
		}
	}
	arch, ok := m.String("general.architecture")
	if !ok {
		c.fail(keyName("general.architecture"), "is missing or no string")
	}
	if base != nil {
		if want, _ := base.Metadata.String("general.architecture"); arch != want {
			c.fail(keyName("general.architecture"), "is %q, but the base model is %q", arch, want)
		}
	}
	alpha, ok := m.Float("adapter.lora.alpha")
	if !ok || m["adapter.lora.alpha"].Type != Float32 || math.IsNaN(alpha) || math.IsInf(alpha, 0) {
		c.fail(keyName("adapter.lora.alpha"), "is missing or no finite float32")
	}
	if _, ok := m["adapter.alora.invocation_tokens"]; ok {
		c.fail(keyName("adapter.alora.invocation_tokens"), "is set: activated LoRA is not supported")
	}
	if len(f.Tensors) == 0 {
		c.fail("header", "lists no tensors: the adapter is empty")
	}
	for _, t := range f.Tensors {
		c.adapterTensor(t, base)
		if c.err != nil {
			return c.err
		}
	}
	return c.err
}

func (c *checker) adapterTensor(t Tensor, base *File) {
	what := fmt.Sprintf("tensor %q", t.Name)
	name, isA := strings.CutSuffix(t.Name, SuffixA)
	other := name + SuffixB
	if !isA {
		var isB bool
		if name, isB = strings.CutSuffix(t.Name, SuffixB); !isB {
			c.fail(what, "has a name that does not end in %s or %s", SuffixA, SuffixB)
			return
		}
		other = name + SuffixA
	}
	// The engine removes the suffix wherever it stands in the name.
	if strings.Contains(name, SuffixA) || strings.Contains(name, SuffixB) {
		c.fail(what, "has a LoRA suffix in the middle of its name")
	}
	if len(t.Shape) != 2 || !slices.Contains([]Type{F32, F16, BF16}, t.Type) {
		c.fail(what, "is %s with shape %v, expected a matrix of f32, f16 or bf16", t.Type, t.Shape)
	}
	pair, ok := c.f.Tensor(other)
	if !ok {
		c.fail(what, "has no other half %q", other)
	}
	if c.err != nil {
		return
	}
	if isA && (len(pair.Shape) != 2 || pair.Shape[0] != t.Shape[1]) {
		c.fail(what, "has shape %v and its other half %v: the ranks differ", t.Shape, pair.Shape)
	}
	if base != nil {
		w, ok := base.Tensor(name)
		if !ok {
			c.fail(what, "is for %q, which the base model does not have", name)
		} else if len(w.Shape) != 2 || isA && t.Shape[0] != w.Shape[0] || !isA && t.Shape[1] != w.Shape[1] {
			c.fail(what, "has shape %v, which does not fit the base model's %v", t.Shape, w.Shape)
		}
		if name == "token_embd.weight" {
			c.fail(what, "adapts the token embedding, which is not supported")
		}
	}
	if c.err == nil && c.f.data != nil && !finite(c.f.Data(t), t.Type) {
		c.fail(what, "has weights that are infinite or not a number")
	}
}

// finite reports whether all elements of encoded F32, F16 or BF16 data are: no exponent has all bits set.
func finite(data []byte, t Type) bool {
	if t == F32 {
		for i := 0; i+4 <= len(data); i += 4 {
			if binary.LittleEndian.Uint32(data[i:])&0x7f800000 == 0x7f800000 {
				return false
			}
		}
		return true
	}
	exponent := uint16(0x7c00)
	if t == BF16 {
		exponent = 0x7f80
	}
	for i := 0; i+2 <= len(data); i += 2 {
		if binary.LittleEndian.Uint16(data[i:])&exponent == exponent {
			return false
		}
	}
	return true
}
