package reference

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/hone-llm/hone/internal/gguf"
)

// read expands a tensor of n elements.
func read(f *gguf.File, name string, n int) ([]float64, error) {
	t, ok := f.Tensor(name)
	if !ok {
		return nil, fmt.Errorf("tensor %q: missing", name)
	}
	if t.Elements() != int64(n) {
		return nil, fmt.Errorf("tensor %q: shape %v, expected %d elements", name, t.Shape, n)
	}
	values, err := dequantize(t.Type, f.Data(t))
	if err != nil {
		return nil, fmt.Errorf("tensor %q: %w", name, err)
	}
	return values, nil
}

// iq4nl is kvalues_iq4nl of ggml-common.h.
var iq4nl = [16]float64{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}

// dequantize expands encoded elements. The 4-bit and 5-bit types keep 32 elements in a block as x = d q + m: d and m are
// half-precision floats, the low four bits of element i and of i+16 share byte i, and a fifth bit is bit i of an integer.
// Types without an m centre q around 0; IQ4_NL looks its q up in a table. Source: dequantize_row_* of ggml-quants.c.
func dequantize(t gguf.Type, data []byte) ([]float64, error) {
	var out []float64
	size := int(t.TypeBytes())
	for ; size > 0 && len(data) >= size; data = data[size:] {
		switch d := binary.LittleEndian; t {
		case gguf.F32:
			out = append(out, float64(math.Float32frombits(d.Uint32(data))))
		case gguf.F16:
			out = append(out, half(data))
		case gguf.BF16:
			out = append(out, float64(math.Float32frombits(uint32(d.Uint16(data))<<16)))
		case gguf.Q8_0:
			for _, q := range data[2:size] {
				out = append(out, half(data)*float64(int8(q)))
			}
		case gguf.Q4_0:
			out = append(out, unpack(data[2:size], 0, half(data), -8*half(data))...)
		case gguf.Q4_1:
			out = append(out, unpack(data[4:size], 0, half(data), half(data[2:]))...)
		case gguf.Q5_0:
			out = append(out, unpack(data[6:size], d.Uint32(data[2:]), half(data), -16*half(data))...)
		case gguf.Q5_1:
			out = append(out, unpack(data[8:size], d.Uint32(data[4:]), half(data), half(data[2:]))...)
		case gguf.IQ4NL:
			for _, q := range unpack(data[2:size], 0, 1, 0) {
				out = append(out, half(data)*iq4nl[int(q)])
			}
		default:
			return nil, fmt.Errorf("type %s is not expanded here, only f32, f16, bf16, q8_0, q5_0, q5_1, q4_0, q4_1 and iq4_nl", t)
		}
	}
	return out, nil
}

func unpack(low []byte, fifth uint32, d, m float64) []float64 {
	out := make([]float64, 32)
	for i, b := range low {
		out[i] = d*float64(uint32(b&15)|fifth>>i&1<<4) + m
		out[i+16] = d*float64(uint32(b>>4)|fifth>>(i+16)&1<<4) + m // #nosec G602 -- low has 16 bytes
	}
	return out
}

// half decodes an IEEE 754 binary16.
func half(data []byte) float64 {
	bits := binary.LittleEndian.Uint16(data)
	exponent, fraction := int(bits>>10&31), float64(bits&1023)
	value := math.Ldexp(1024+fraction, exponent-25)
	switch exponent {
	case 0:
		value = math.Ldexp(fraction, -24)
	case 31:
		value = math.Inf(1)
		if fraction != 0 {
			value = math.NaN()
		}
	}
	if bits>>15 == 1 {
		return -value
	}
	return value
}
