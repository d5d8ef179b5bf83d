package graph

import (
	"runtime"
	"slices"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
)

// The layouts of GPUs. A transpose may be BF16 or Stored, which is expanded to BF16 as it is needed: the kernels that
// multiply quantised weights as they are keep the scale of a block of gradients in float16, which is 0 below 1e-6 or so
// and infinite above 1e4, and F16 weights do the same to each gradient.

// DeviceLayout is the default on a GPU: 4 bytes a weight, and the fastest kernels from about 50 tokens on. F16 keeps 3
// bits more of weights and activations than BF16, which gradients need for its range.
func DeviceLayout() Layout { return Layout{ggml.F16, ggml.BF16} }

// DeviceStoredLayout is the weights as they are in the file, once: 0.6 bytes a weight of a 4-bit model. Gradients are as
// exact as those of DeviceLayout.
func DeviceStoredLayout() Layout { return Layout{Stored, Stored} }

// pickable is a matrix that the backend picks rows of: as it is in the file, unless a GPU has no kernel for the type.
func (l *loader) pickable(name string, in, out int) (ggml.Tensor, error) {
	m := l.model
	gpu := m.backend.GPU()
	src, ok := m.file.Tensor(name)
	if !gpu || !ok || len(src.Shape) != 2 || !slices.Contains([]gguf.Type{gguf.Q4K, gguf.Q5K, gguf.IQ4NL}, src.Type) {
		return l.stored(name, in, out)
	}
	t := m.context.New(ggml.F16, in, out)
	l.fills = append(l.fills, uploadRows(t, ggml.F16, m.file.Data(src), ggml.Type(src.Type), in, out)...)
	return t, nil
}

// stripe is how many columns or rows of a matrix a host thread converts at once: whole blocks of every type.
const stripe = 256

// uploads are functions that convert parts of the matrix [out, in] to the types of the two weights and copy them to
// their device; they may run at the same time.
func (l linear) uploads(data []byte, t ggml.Type) []func() {
	in, out := l.w.in, l.w.out
	var all []func()
	if l.w.kind != Stored {
		all = uploadRows(l.w.t, l.w.kind, data, t, in, out)
	}
	if l.wt.kind == Stored {
		return all
	}
	rowBytes := len(data) / out
	for from := 0; from < in; from += stripe {
		all = append(all, func() {
			n := min(stripe, in-from)
			offset, length := rowBytes*from/in, rowBytes*n/in
			columns := make([]float32, n*out) // [n, out]
			values := make([]float32, 8*n)
			for row := 0; row < out; row += 8 {
				rows := min(8, out-row)
				for i := range rows {
					at := (row+i)*rowBytes + offset
					ggml.Dequantize(values[i*n:(i+1)*n], t, data[at:at+length])
				}
				for c := range n {
					to := columns[c*out+row : c*out+row+rows]
					for i := range to {
						to[i] = values[i*n+c]
					}
				}
			}
			store(l.wt.t, l.wt.kind, columns, from, out)
		})
	}
	return all
}

// uploadRows are functions that copy stripes of the rows of the matrix [out, in] to t as kind.
func uploadRows(t ggml.Tensor, kind ggml.Type, data []byte, stored ggml.Type, in, out int) []func() {
	if kind == stored {
		return []func(){func() { t.SetBytes(data, 0) }}
	}
	rowBytes := len(data) / out
	var all []func()
	for from := 0; from < out; from += stripe {
		all = append(all, func() {
			n := min(stripe, out-from)
			values := make([]float32, n*in)
			ggml.Dequantize(values, stored, data[from*rowBytes:(from+n)*rowBytes])
			store(t, kind, values, from, in)
		})
	}
	return all
}

// store writes whole rows of n elements as kind, from row first on.
func store(t ggml.Tensor, kind ggml.Type, values []float32, first, n int) {
	size := ggml.RowBytes(kind, n)
	bytes := make([]byte, len(values)/n*size)
	for i := 0; i*n < len(values); i++ {
		ggml.Quantize(bytes[i*size:(i+1)*size], kind, values[i*n:(i+1)*n])
	}
	t.SetBytes(bytes, first*size)
	runtime.KeepAlive(bytes)
}
