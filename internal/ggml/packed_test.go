package ggml

import (
	"fmt"
	"math"
	"testing"
	"time"
)

// packed adds a tensor with W [out, in] packed, or its transpose.
func (h *harness) packed(w []float32, in, out int, transpose bool) Tensor {
	const band = 64
	bytes := PackedBytes(in, out)
	if transpose {
		bytes = PackedBytes(out, in)
	}
	tensor := h.x.New(I8, bytes)
	h.fills = append(h.fills, func() {
		for i := range tensor.Bytes(bytes) {
			tensor.Bytes(bytes)[i] = 0xff
		}
		for row := 0; row < out; row += band {
			values := w[row*in : min(row+band, out)*in]
			if transpose {
				tensor.SetPackedTranspose(values, row, in, out)
			} else {
				tensor.SetPackedRows(values, row, in, out)
			}
		}
	})
	return tensor
}

// product is W x for W [out, in] and x [T, in].
func product(w, x []float32, in, out int) []float64 {
	y := make([]float64, len(x)/in*out)
	for t := range len(x) / in {
		for o := range out {
			for i := range in {
				y[t*out+o] += float64(w[o*in+i]) * float64(x[t*in+i])
			}
		}
	}
	return y
}

func transposed(w []float32, in, out int) []float32 {
	t := make([]float32, len(w))
	for o := range out {
		for i := range in {
			t[i*out+o] = w[o*in+i]
		}
	}
	return t
}

func relativeError(got []float32, want []float64) float64 {
	var d, n float64
	for i, w := range want {
		d += (float64(got[i]) - w) * (float64(got[i]) - w)
		n += w * w
	}
	return math.Sqrt(d / n)
}

func TestPackedMatMul(t *testing.T) {
	worst := 0.0
	for _, s := range []struct{ in, out, tokens int }{{1, 1, 1}, {64, 48, 8}, {65, 49, 9}, {576, 192, 33}, {80, 130, 7}, {200, 97, 131}, {1536, 50, 2}} {
		w, x := normal(1, s.in*s.out), normal(2, s.in*s.tokens)
		dy := normal(3, s.out*s.tokens)
		for i := range x {
			x[i] *= float32(math.Exp(float64(i % 7))) // elements of different size
		}
		got := eachThreads(t, func(h *harness) []Tensor {
			residual := h.floats(normal(4, s.out*s.tokens), s.out, s.tokens)
			quantized, back := h.addBytes(h.x.Quantize(h.floats(x, s.in, s.tokens))), h.addBytes(h.x.Quantize(h.floats(dy, s.out, s.tokens)))
			weights := h.packed(w, s.in, s.out, false)
			return []Tensor{
				h.add(h.x.PackedMatMul(weights, quantized, Tensor{}, s.in, s.out, s.tokens)),
				h.add(h.x.PackedMatMul(h.packed(w, s.in, s.out, true), back, Tensor{}, s.out, s.in, s.tokens)),
				h.add(h.x.PackedMatMul(weights, quantized, residual, s.in, s.out, s.tokens)),
			}
		})
		y := product(w, x, s.in, s.out)
		dx := product(transposed(w, s.in, s.out), dy, s.out, s.in)
		for i, want := range [][]float64{y, dx} {
			if e := relativeError(got[i], want); e > 5e-4 {
				t.Errorf("%+v: product %d: relative error %g", s, i, e)
			} else {
				worst = max(worst, e)
			}
		}
		for i, r := range normal(4, s.out*s.tokens) {
			if got[2][i] != got[0][i]+r {
				t.Fatalf("%+v: element %d with residual %g: %g, alone %g", s, i, r, got[2][i], got[0][i])
			}
		}
	}
	t.Logf("relative error at most %.2g", worst)
}

func (h *harness) addBytes(node Tensor) Tensor {
	h.fills = append(h.fills, func() {
		for i := range node.Bytes(node.Elements()) {
			node.Bytes(node.Elements())[i] = 0xff
		}
	})
	h.fills[0], h.fills[len(h.fills)-1] = h.fills[len(h.fills)-1], h.fills[0]
	return node
}

// What must survive: gradients far below the smallest float16, rows with one huge element, zeros.
func TestPackedMatMulRange(t *testing.T) {
	const in, out, tokens = 192, 60, 4
	w, x := normal(1, in*out), normal(2, in*tokens)
	for i := range in {
		x[i] *= 1e-30                            // token 0
		x[in+i] = 0                              // token 1
		x[2*in+i] *= 1e30                        // token 2
		w[3*in+i], w[4*in+i] = 0, w[4*in+i]*1e-5 // outputs 3 and 4
	}
	x[3*in+70] = 3000 // token 3: its block keeps 13 bits below this
	got := eachThreads(t, func(h *harness) []Tensor {
		return []Tensor{h.add(h.x.PackedMatMul(h.packed(w, in, out, false), h.addBytes(h.x.Quantize(h.floats(x, in, tokens))), Tensor{}, in, out, tokens))}
	})
	want := product(w, x, in, out)
	for token, tolerance := range []float64{3e-4, 0, 3e-4, 3e-4} {
		if e := relativeError(got[0][token*out:][:out], want[token*out:][:out]); token != 1 && !(e <= tolerance) {
			t.Errorf("token %d: relative error %g", token, e)
		}
	}
	for o := range out {
		if got[0][out+o] != 0 || o == 3 && got[0][o] != 0 {
			t.Fatalf("output %d: zeros give %g", o, got[0][out+o])
		}
	}
	if e := math.Abs(float64(got[0][4])/want[4] - 1); e > 1e-2 {
		t.Errorf("a small output is off by %g", e)
	}
}

// The trainer finds a spoiled step by its gradients, so a NaN must not be hidden by a conversion to integers.
func TestPackedMatMulKeepsNaN(t *testing.T) {
	const in, out, tokens = 130, 50, 20
	w, x := normal(1, in*out), normal(2, in*tokens)
	bad := map[int]float32{0: float32(math.NaN()), 5: float32(math.Inf(1)), 9: float32(math.Inf(-1)), 19: -float32(math.NaN())}
	for token, v := range bad {
		x[token*in+7*token%in] = v
	}
	w[11*in+129] = float32(math.Inf(1))
	got := eachThreads(t, func(h *harness) []Tensor {
		return []Tensor{h.add(h.x.PackedMatMul(h.packed(w, in, out, false), h.addBytes(h.x.Quantize(h.floats(x, in, tokens))), Tensor{}, in, out, tokens))}
	})
	for i, v := range got[0] {
		_, spoiled := bad[i/out]
		if spoiled = spoiled || i%out == 11; spoiled != (v != v) {
			t.Fatalf("token %d output %d: %g", i/out, i%out, v)
		}
	}
}

// BenchmarkMatMul times the packed product against ggml's products of F32 and BF16 weights, one after the other, best
// of b.N rounds: GF/s of all threads, and of the packed one with the rounding of x included.
func BenchmarkMatMul(b *testing.B) {
	for _, s := range []struct{ in, out, tokens int }{
		{576, 576, 256}, {576, 192, 256}, {576, 1536, 256}, {1536, 576, 256}, {576, 576, 64}, {576, 576, 1024}, {576, 1536, 1024}, {1536, 576, 1024}, {576, 49152, 64},
		{1536, 1536, 1024}, {1536, 8960, 1024}, {8960, 1536, 1024}, {1536, 256, 1024},
	} {
		b.Run(fmt.Sprintf("%dx%dx%d", s.in, s.out, s.tokens), func(b *testing.B) {
			weights, x := make([]float32, s.in*s.out), normal(2, s.in*s.tokens)
			copy(weights, normal(1, min(len(weights), 1<<20)))
			const threads = 2
			build := func(f func(h *harness, x Tensor)) func() time.Duration {
				h := newHarness(b, threads)
				f(h, h.floats(x, s.in, s.tokens))
				buffer, err := h.x.Allocate(h.backend)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(buffer.Free)
				for _, fill := range h.fills {
					fill()
				}
				graph := h.x.NewGraph(64)
				for _, node := range h.nodes {
					graph.Add(node)
				}
				allocator := h.backend.NewAllocator()
				b.Cleanup(allocator.Free)
				return func() time.Duration {
					start := time.Now()
					if err := h.backend.Compute(graph, allocator); err != nil {
						b.Fatal(err)
					}
					return time.Since(start)
				}
			}
			plain := func(t Type) func() time.Duration {
				return build(func(h *harness, x Tensor) {
					w := h.x.New(t, s.in, s.out)
					h.fills = append(h.fills, func() { w.SetRows(weights, 0) })
					h.add(h.x.MulMat(w, x))
				})
			}
			kinds := []struct {
				name string
				run  func() time.Duration
				best time.Duration
			}{
				{name: "f32", run: plain(F32)},
				{name: "bf16", run: plain(BF16)},
				{name: "packed", run: build(func(h *harness, x Tensor) {
					h.add(h.x.PackedMatMul(h.packed(weights, s.in, s.out, false), h.x.Quantize(x), Tensor{}, s.in, s.out, s.tokens))
				})},
				{name: "quantize", run: build(func(h *harness, x Tensor) { h.add(h.x.Quantize(x)) })},
			}
			for b.Loop() {
				for i := range kinds {
					if d := kinds[i].run(); kinds[i].best == 0 || d < kinds[i].best {
						kinds[i].best = d
					}
				}
			}
			flops := 2 * float64(s.in) * float64(s.out) * float64(s.tokens)
			for _, k := range kinds[:3] {
				b.ReportMetric(flops/k.best.Seconds()/1e9, k.name+"-GF/s")
			}
			b.ReportMetric(kinds[2].best.Seconds()/kinds[0].best.Seconds(), "packed/f32-time")
			b.ReportMetric(kinds[2].best.Seconds()/kinds[1].best.Seconds(), "packed/bf16-time")
			b.ReportMetric(100*kinds[3].best.Seconds()/kinds[2].best.Seconds(), "quantize-%")
		})
	}
}
