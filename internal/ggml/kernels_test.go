package ggml

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

// harness computes a few nodes whose every output starts as NaN, so that an element that is not written shows.
type harness struct {
	t       testing.TB
	x       *Context
	backend *Backend
	fills   []func()
	nodes   []Tensor
}

func newHarness(t testing.TB, threads int) *harness {
	t.Helper()
	backend, err := NewCPU(threads)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(backend.Close)
	h := &harness{t: t, x: NewContext(64, 64), backend: backend}
	t.Cleanup(h.x.Free)
	return h
}

func (h *harness) floats(values []float32, sizes ...int) Tensor {
	tensor := h.x.New(F32, sizes...)
	h.fills = append(h.fills, func() { copy(tensor.Floats(), values) })
	return tensor
}

func (h *harness) ints(values []int32, sizes ...int) Tensor {
	tensor := h.x.New(I32, sizes...)
	h.fills = append(h.fills, func() { copy(tensor.Ints(), values) })
	return tensor
}

func (h *harness) add(node Tensor) Tensor {
	h.nodes = append(h.nodes, node)
	return node
}

func (h *harness) run() {
	h.t.Helper()
	buffer, err := h.x.Allocate(h.backend)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(buffer.Free)
	for _, node := range h.nodes {
		poison(node)
	}
	for _, fill := range h.fills {
		fill()
	}
	graph := h.x.NewGraph(64)
	for _, node := range h.nodes {
		graph.Add(node)
	}
	allocator := h.backend.NewAllocator()
	defer allocator.Free()
	if err := h.backend.Compute(graph, allocator); err != nil {
		h.t.Fatal(err)
	}
}

func poison(node Tensor) {
	if Type(node.c._type) == I8 {
		for i := range node.Bytes(node.Elements()) {
			node.Bytes(node.Elements())[i] = 0xff
		}
		return
	}
	for i := range node.Floats() {
		node.Floats()[i] = float32(math.NaN())
	}
}

// eachThreads computes with 1, 2 and 3 threads, expects identical bits, and returns the outputs.
func eachThreads(t *testing.T, build func(h *harness) []Tensor) [][]float32 {
	t.Helper()
	var outputs [][]float32
	for threads := 1; threads <= 3; threads++ {
		h := newHarness(t, threads)
		results := build(h)
		h.run()
		for i, result := range results {
			values := append([]float32(nil), result.Floats()...)
			if threads == 1 {
				outputs = append(outputs, values)
				continue
			}
			for j, v := range values {
				if math.Float32bits(v) != math.Float32bits(outputs[i][j]) {
					t.Fatalf("output %d element %d: %g with %d threads, %g with one", i, j, v, threads, outputs[i][j])
				}
			}
		}
	}
	return outputs
}

func normal(seed uint64, n int) []float32 {
	random := rand.New(rand.NewPCG(seed, 1))
	values := make([]float32, n)
	for i := range values {
		values[i] = float32(random.NormFloat64())
	}
	return values
}

// near compares with float64 results, relative to their root mean square.
func near(t *testing.T, what string, got []float32, want []float64, tolerance float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d values, want %d", what, len(got), len(want))
	}
	square := 0.0
	for _, w := range want {
		square += w * w
	}
	unit := math.Sqrt(square / float64(len(want)))
	for i, w := range want {
		if !(math.Abs(float64(got[i])-w) <= tolerance*max(unit, math.Abs(w))) {
			t.Fatalf("%s: element %d is %g, want %g (root mean square %g)", what, i, got[i], w, unit)
		}
	}
}

// attention is the double loop that the operation must agree with; it returns the output and the three gradients.
func attention(q, k, v, dout []float32, segments []int32, h Heads) (out, dq, dk, dv []float64) {
	nq, nk := h.Query*h.Size, h.KeyValue*h.Size
	out, dq, dk, dv = make([]float64, len(q)), make([]float64, len(q)), make([]float64, len(k)), make([]float64, len(k))
	scale := 1 / math.Sqrt(float64(h.Size))
	for s := 0; s < len(segments); s += 3 {
		for t := segments[s]; t < segments[s+1]; t++ {
			var keys []int
			for from, end := s, t+1; from >= 0; {
				for i := segments[from]; i < end; i++ {
					keys = append(keys, int(i))
				}
				if from = 3 * int(segments[from+2]); from >= 0 {
					end = segments[from+1]
				}
			}
			for head := range h.Query {
				at, kv := int(t)*nq+head*h.Size, head*h.KeyValue/h.Query*h.Size
				p := make([]float64, len(keys))
				largest, z := math.Inf(-1), 0.0
				for i, key := range keys {
					for d := range h.Size {
						p[i] += float64(q[at+d]) * float64(k[key*nk+kv+d]) * scale
					}
					largest = max(largest, p[i])
				}
				for i := range p {
					p[i] = math.Exp(p[i] - largest)
					z += p[i]
				}
				dp := make([]float64, len(keys))
				mean := 0.0
				for i, key := range keys {
					p[i] /= z
					for d := range h.Size {
						out[at+d] += p[i] * float64(v[key*nk+kv+d])
						dv[key*nk+kv+d] += p[i] * float64(dout[at+d])
						dp[i] += float64(dout[at+d]) * float64(v[key*nk+kv+d])
					}
					mean += p[i] * dp[i]
				}
				for i, key := range keys {
					ds := p[i] * (dp[i] - mean) * scale
					for d := range h.Size {
						dq[at+d] += ds * float64(k[key*nk+kv+d])
						dk[key*nk+kv+d] += ds * float64(q[at+d])
					}
				}
			}
		}
	}
	return out, dq, dk, dv
}

func TestAttention(t *testing.T) {
	for name, segments := range map[string][]int32{
		"one token": {0, 1, -1},
		"rows":      {0, 3, -1, 3, 70, -1, 70, 71, -1, 71, 104, -1},
		"one tree":  {0, 25, -1, 25, 60, 0, 60, 61, 0, 61, 99, 0},
		"deep":      {0, 17, -1, 17, 20, 0, 20, 53, 1, 53, 54, 2, 54, 120, 1, 120, 136, 0},
		"mixed":     {0, 16, -1, 16, 48, -1, 48, 50, 0, 50, 83, 1, 83, 84, 2, 84, 90, 2, 90, 101, -1, 101, 120, 0},
	} {
		for _, heads := range []Heads{{6, 2, 16}, {3, 3, 32}, {9, 3, 64}, {4, 1, 80}} {
			t.Run(fmt.Sprintf("%s/%d heads over %d of %d", name, heads.Query, heads.KeyValue, heads.Size), func(t *testing.T) {
				tokens := 0
				for i := 1; i < len(segments); i += 3 {
					tokens = max(tokens, int(segments[i]))
				}
				nq, nk := heads.Query*heads.Size, heads.KeyValue*heads.Size
				q, k, v, dout := normal(1, nq*tokens), normal(2, nk*tokens), normal(3, nk*tokens), normal(4, nq*tokens)
				got := eachThreads(t, func(h *harness) []Tensor {
					tq, tk, tv := h.floats(q, nq, tokens), h.floats(k, nk, tokens), h.floats(v, nk, tokens)
					table := h.ints(segments, 3, len(segments)/3)
					out := h.add(h.x.Attention(tq, tk, tv, table, heads))
					dq, dk, dv, node := h.x.AttentionBack(tq, tk, tv, table, h.floats(dout, nq, tokens), heads)
					h.add(node)
					return []Tensor{out, dq, dk, dv}
				})
				out, dq, dk, dv := attention(q, k, v, dout, segments, heads)
				near(t, "output", got[0], out, 1e-5)
				near(t, "dq", got[1], dq, 1e-5)
				near(t, "dk", got[2], dk, 1e-5)
				near(t, "dv", got[3], dv, 1e-5)
			})
		}
	}
}

// A query that is not a number must not come out as a number.
func TestAttentionKeepsNaN(t *testing.T) {
	heads := Heads{1, 1, 16}
	q := normal(1, 16*20)
	q[16*7+3] = float32(math.NaN())
	got := eachThreads(t, func(h *harness) []Tensor {
		return []Tensor{h.add(h.x.Attention(h.floats(q, 16, 20), h.floats(normal(2, 16*20), 16, 20), h.floats(normal(3, 16*20), 16, 20), h.ints([]int32{0, 20, -1}, 3, 1), heads))}
	})
	for i, v := range got[0] {
		if isNaN := v != v; isNaN != (i/16 == 7) {
			t.Fatalf("token %d: %g", i/16, v)
		}
	}
}

func TestCrossEntropy(t *testing.T) {
	const vocabulary, count, first = 133, 7, 40
	columns := []int32{40, 41, 41, 41, 43, 44, 45, 45, 46} // none at 42
	labels := []int32{3, 0, 60, 132, 17, 128, 5, 131, 99}
	weights := []float32{1, 0.5, 0, -2, 1e-9, 3, 1, 1, 0.25}
	logits := normal(1, vocabulary*count)
	logits[1*vocabulary+60] = 50 // the most likely of its column
	logits[4*vocabulary+128] = 9
	const scale = 3.0
	gradient := make([]float64, len(logits))
	stats := make([]float64, 2*len(labels))
	for i, label := range labels {
		x := logits[int(columns[i]-first)*vocabulary:][:vocabulary]
		z, largest := 0.0, x[0]
		for _, v := range x {
			z += math.Exp(float64(v))
			largest = max(largest, v)
		}
		stats[2*i] = math.Log(z) - float64(x[label])
		if x[label] == largest {
			stats[2*i+1] = 1
		}
		for j, v := range x {
			gradient[int(columns[i]-first)*vocabulary+j] += scale * float64(weights[i]) * math.Exp(float64(v)) / z
		}
		gradient[int(columns[i]-first)*vocabulary+int(label)] -= scale * float64(weights[i])
	}
	n := len(labels)
	got := eachThreads(t, func(h *harness) []Tensor {
		c, l := h.ints(columns, n), h.ints(labels, n)
		alone := h.add(h.x.New(F32, 2, n))
		kept := h.add(h.x.Losses(h.floats(logits, vocabulary, count), c, l, alone, first))
		both := h.add(h.x.New(F32, 2, n))
		return []Tensor{h.add(h.x.CrossEntropy(h.floats(logits, vocabulary, count), c, l, h.floats(weights, n), both, first, scale)), both, kept, alone}
	})
	near(t, "gradient", got[0], gradient, 1e-6)
	near(t, "stats", got[1], stats, 1e-6)
	near(t, "stats without the gradient", got[3], stats, 1e-6)
	for i, v := range got[2] {
		if v != logits[i] {
			t.Fatalf("Losses changed logit %d", i)
		}
	}
	for i := range 2 * vocabulary {
		if got[0][i+2*vocabulary] != 0 && i < vocabulary {
			t.Fatalf("a column without targets has a gradient")
		}
	}
}

func TestScatterRows(t *testing.T) {
	const width, tokens = 19, 11
	a, b := normal(1, width*4), normal(2, width*3)
	ia, ib := []int32{9, 0, 9, 4}, []int32{4, 10, 0}
	want := make([]float64, width*tokens)
	for i, row := range ia {
		for j := range width {
			want[int(row)*width+j] += float64(a[i*width+j])
		}
	}
	for i, row := range ib {
		for j := range width {
			want[int(row)*width+j] += float64(b[i*width+j])
		}
	}
	got := eachThreads(t, func(h *harness) []Tensor {
		fresh := h.add(h.x.ScatterRows(Tensor{}, h.floats(a, width, 4), h.ints(ia, 4), tokens))
		return []Tensor{h.add(h.x.ScatterRows(fresh, h.floats(b, width, 3), h.ints(ib, 3), tokens))}
	})
	near(t, "rows", got[0], want, 1e-6)
}

func TestRMSNorm(t *testing.T) {
	const eps = 1e-5
	for _, s := range []struct{ d, tokens int }{{16, 1}, {576, 7}, {2064, 5}} {
		x, gamma, dy, residual := normal(1, s.d*s.tokens), normal(2, s.d), normal(3, s.d*s.tokens), normal(4, s.d*s.tokens)
		y, dx := make([]float64, len(x)), make([]float64, len(x))
		for from := 0; from < len(x); from += s.d {
			square, dot := 0.0, 0.0
			for i := range s.d {
				square += float64(x[from+i]) * float64(x[from+i])
				dot += float64(x[from+i]) * float64(gamma[i]) * float64(dy[from+i])
			}
			inverse := 1 / math.Sqrt(square/float64(s.d)+eps)
			for i := range s.d {
				y[from+i] = float64(x[from+i]) * inverse * float64(gamma[i])
				dx[from+i] = float64(gamma[i])*float64(dy[from+i])*inverse - float64(x[from+i])*dot*inverse*inverse*inverse/float64(s.d)
			}
		}
		got := eachThreads(t, func(h *harness) []Tensor {
			tx, tg, td := h.floats(x, s.d, s.tokens), h.floats(gamma, s.d), h.floats(dy, s.d, s.tokens)
			return []Tensor{
				h.add(h.x.RMSNorm(tx, tg, eps)),
				h.add(h.x.RMSNormBack(tx, tg, td, Tensor{}, eps)),
				h.add(h.x.RMSNormBack(tx, tg, td, h.floats(residual, s.d, s.tokens), eps)),
			}
		})
		near(t, "norm", got[0], y, 1e-6)
		near(t, "gradient", got[1], dx, 1e-5)
		for i := range dx {
			dx[i] += float64(residual[i])
		}
		near(t, "gradient and residual", got[2], dx, 1e-5)
	}
}

func TestSwiGLU(t *testing.T) {
	const f, tokens = 80, 13
	gate, up, dy := normal(1, f*tokens), normal(2, f*tokens), normal(3, f*tokens)
	for i := range gate {
		gate[i] *= float32(i%50) / 4 // up to about 40: both ends of the exponential
	}
	y, dgate, dup := make([]float64, len(gate)), make([]float64, len(gate)), make([]float64, len(gate))
	for i, g := range gate {
		s := 1 / (1 + math.Exp(-float64(g)))
		y[i] = float64(g) * s * float64(up[i])
		dup[i] = float64(dy[i]) * float64(g) * s
		dgate[i] = float64(dy[i]) * float64(up[i]) * s * (1 + float64(g)*(1-s))
	}
	got := eachThreads(t, func(h *harness) []Tensor {
		tg, tu, td := h.floats(gate, f, tokens), h.floats(up, f, tokens), h.floats(dy, f, tokens)
		out := h.add(h.x.SwiGLU(tg, tu))
		a, b, node := h.x.SwiGLUBack(tg, tu, td)
		h.add(node)
		return []Tensor{out, a, b}
	})
	near(t, "output", got[0], y, 1e-6)
	near(t, "dgate", got[1], dgate, 1e-6)
	near(t, "dup", got[2], dup, 1e-6)
}
