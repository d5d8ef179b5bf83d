package ggml

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// The stored types that a layout serves, by ggml's names and numbers.
var repackable = []struct {
	name  string
	t     Type
	block int // elements
}{
	{"q4_0", 2, 32}, {"q4_1", 3, 32}, {"q5_0", 6, 32}, {"q5_1", 7, 32}, {"q8_0", Q8_0, 32},
	{"q4_K", 12, 256}, {"q5_K", 13, 256}, {"q6_K", 14, 256}, {"iq4_nl", IQ4NL, 32},
}

// minima are the types whose weights have one beside their scale.
var minima = map[string]struct{}{"q4_1": {}, "q5_1": {}, "q4_K": {}, "q5_K": {}}

func storedBytes(values []float32, t Type) []byte {
	data := make([]byte, RowBytes(t, len(values)))
	Quantize(data, t, values)
	return data
}

func expanded(data []byte, t Type, n int) []float32 {
	values := make([]float32, n)
	Dequantize(values, t, data)
	return values
}

// repacked adds a tensor with W [out, in], put in two parts that do not end at a panel's.
func (h *harness) repacked(data []byte, t Type, in, out int) Tensor {
	k, ok := RepackedKind(t)
	if !ok {
		h.t.Fatalf("type %d has no layout", t)
	}
	bytes := RepackedBytes(k, in, out)
	tensor := h.x.New(I8, bytes)
	h.fills = append(h.fills, func() {
		for i := range tensor.Bytes(bytes) {
			tensor.Bytes(bytes)[i] = 0xff
		}
		row, cut := RowBytes(t, in), out/2
		if cut > 0 {
			tensor.SetRepacked(data[:cut*row], t, 0, in, out)
		}
		tensor.SetRepacked(data[cut*row:], t, cut, in, out)
	})
	return tensor
}

func (h *harness) repackedMatMul(data []byte, x, residual []float32, t Type, in, out int) Tensor {
	k, _ := RepackedKind(t)
	tokens := len(x) / in
	var r Tensor
	if residual != nil {
		r = h.floats(residual, out, tokens)
	}
	return h.add(h.x.RepackedMatMul(h.repacked(data, t, in, out), h.addBytes(h.x.QuantizeBytes(h.floats(x, in, tokens))), r, k, in, out, tokens))
}

// rounded is what QuantizeBytes makes of x, in float64.
func rounded(x []float32) []float64 {
	y := make([]float64, len(x))
	for b := 0; b < len(x); b += 32 {
		largest := float32(0)
		for _, v := range x[b : b+32] {
			largest = max(largest, float32(math.Abs(float64(v))))
		}
		for i, v := range x[b : b+32] {
			if largest > 0 {
				y[b+i] = math.RoundToEven(float64(v*(127/largest))) * float64(largest*float32(1/127.))
			}
		}
	}
	return y
}

func product64(w []float32, x []float64, in, out int) []float64 {
	y := make([]float64, len(x)/in*out)
	for t := range len(x) / in {
		for o := range out {
			for i := range in {
				y[t*out+o] += float64(w[o*in+i]) * x[t*in+i]
			}
		}
	}
	return y
}

// Against the products of the dequantised weights: with the rounded activations only the float32 sums differ, with the
// activations themselves the rounding to 8 bits does, about 0.3% of the norm for normal values.
func TestRepackedMatMul(t *testing.T) {
	for _, kind := range repackable {
		for _, s := range []struct{ in, out, tokens int }{{256, 1, 1}, {256, 33, 7}, {768, 64, 13}, {32, 32, 3}, {96, 31, 5}, {160, 97, 41}, {576, 70, 6}} {
			if s.in%kind.block != 0 {
				continue
			}
			data := storedBytes(normal(1, s.in*s.out), kind.t)
			w, x, residual := expanded(data, kind.t, s.in*s.out), normal(2, s.in*s.tokens), normal(3, s.out*s.tokens)
			for i := range x {
				x[i] *= float32(math.Exp(float64(i / 32 % 7))) // blocks of different size
			}
			got := eachThreads(t, func(h *harness) []Tensor {
				return []Tensor{h.repackedMatMul(data, x, nil, kind.t, s.in, s.out), h.repackedMatMul(data, x, residual, kind.t, s.in, s.out)}
			})
			if e := relativeError(got[0], product64(w, rounded(x), s.in, s.out)); e > 1e-6 {
				t.Errorf("%s %+v: relative error %g against rounded activations", kind.name, s, e)
			}
			if e := relativeError(got[0], product(w, x, s.in, s.out)); e > 0.02 {
				t.Errorf("%s %+v: relative error %g", kind.name, s, e)
			}
			for i, r := range residual {
				if got[1][i] != got[0][i]+r {
					t.Fatalf("%s %+v: element %d with residual %g: %g, alone %g", kind.name, s, i, r, got[1][i], got[0][i])
				}
			}
		}
	}
}

// An activation that is 127 at one place of a block and 0 elsewhere is exact, and so must be the weight that it picks.
func TestRepackedWeightsAreExact(t *testing.T) {
	const in, out = 256, 34
	for _, kind := range repackable {
		random := rand.New(rand.NewPCG(7, 7))
		data := storedBytes(normal(1, in*out), kind.t)
		// Every code and every scale bit, with the float16 scales kept finite.
		noise := make([]byte, len(data))
		for i := range noise {
			noise[i] = byte(random.Uint32())
		}
		size := RowBytes(kind.t, kind.block)
		for at := 0; at < len(noise); at += size {
			halves := []int{0}
			if kind.name == "q6_K" {
				halves[0] = 208
			} else if _, minimum := minima[kind.name]; minimum {
				halves = append(halves, 2)
			}
			for _, i := range halves {
				binary.LittleEndian.PutUint16(noise[at+i:], uint16(random.Uint32())&0xbfff) // below 2
			}
		}
		for _, data := range [][]byte{data, noise} {
			w := expanded(data, kind.t, in*out)
			x := make([]float32, in*in) // token i picks column i
			for i := range in {
				x[i*in+i] = 127
			}
			got := eachThreads(t, func(h *harness) []Tensor { return []Tensor{h.repackedMatMul(data, x, nil, kind.t, in, out)} })
			for i, v := range got[0] {
				row, column := i%out, i/out
				want, largest := float64(w[row*in+column])*127, 0.0
				for _, other := range w[row*in+column/32*32:][:32] {
					largest = max(largest, math.Abs(float64(other)))
				}
				// Dequantisation rounds a weight with a minimum to float32, and the product the sum of its two parts.
				tolerance := math.Abs(want) * 1.2e-7
				if _, minimum := minima[kind.name]; minimum {
					tolerance = largest * 127 * 1e-6
				}
				if math.Abs(float64(v)-want) > tolerance {
					t.Fatalf("%s: weight %d of row %d: %g, want %g", kind.name, column, row, v/127, want/127)
				}
			}
		}
	}
}

// A token's result must not depend on the batch that it is in.
func TestRepackedMatMulAlone(t *testing.T) {
	const in, out, most = 768, 65, 40
	for _, kind := range repackable {
		data, x := storedBytes(normal(1, in*out), kind.t), normal(2, in*most)
		all := eachThreads(t, func(h *harness) []Tensor { return []Tensor{h.repackedMatMul(data, x, nil, kind.t, in, out)} })[0]
		for tokens := 1; tokens < most; tokens++ {
			from := (most - tokens) / 2
			h := newHarness(t, 1+tokens%3)
			part := h.repackedMatMul(data, x[from*in:][:tokens*in], nil, kind.t, in, out)
			h.run()
			for i, v := range part.Floats() {
				if math.Float32bits(v) != math.Float32bits(all[from*out+i]) {
					t.Fatalf("%s: token %d of %d, output %d: %g, in the whole batch %g", kind.name, i/out, tokens, i%out, v, all[from*out+i])
				}
			}
		}
	}
}

func TestRepackedMatMulKeepsNaN(t *testing.T) {
	const in, out, tokens = 160, 50, 20
	x := normal(2, in*tokens)
	bad := map[int]float32{0: float32(math.NaN()), 5: float32(math.Inf(1)), 9: float32(math.Inf(-1)), 19: -float32(math.NaN())}
	for token, v := range bad {
		x[token*in+7*token%in] = v
	}
	clear(x[3*in:][:in])
	for i := range in {
		x[4*in+i] *= 1e-38
	}
	for _, kind := range repackable {
		if in%kind.block != 0 {
			continue
		}
		data := storedBytes(normal(1, in*out), kind.t)
		got := eachThreads(t, func(h *harness) []Tensor { return []Tensor{h.repackedMatMul(data, x, nil, kind.t, in, out)} })
		for i, v := range got[0] {
			if _, spoiled := bad[i/out]; spoiled != (v != v) || (i/out == 3 || i/out == 4) && v != 0 {
				t.Fatalf("%s: token %d output %d: %g", kind.name, i/out, i%out, v)
			}
		}
	}
}

// The fused producers must give the bits of their two nodes, in both layouts, padding included.
func TestFusedQuantize(t *testing.T) {
	for _, s := range []struct{ in, tokens int }{{32, 1}, {576, 1}, {576, 9}, {1536, 17}, {96, 8}, {544, 3}} {
		x, gamma, gateUp := normal(1, s.in*s.tokens), normal(2, s.in), normal(3, 2*s.in*s.tokens)
		gate, up := make([]float32, s.in*s.tokens), make([]float32, s.in*s.tokens)
		for i := range s.tokens {
			copy(gate[i*s.in:][:s.in], gateUp[2*i*s.in:])
			copy(up[i*s.in:][:s.in], gateUp[(2*i+1)*s.in:])
		}
		for threads := 1; threads <= 3; threads++ {
			h := newHarness(t, threads)
			v, g, gu := h.floats(x, s.in, s.tokens), h.floats(gamma, s.in), h.floats(gateUp, 2*s.in, s.tokens)
			norm := h.add(h.x.RMSNorm(v, g, 1e-5))
			gateT, upT := h.floats(gate, s.in, s.tokens), h.floats(up, s.in, s.tokens)
			swiglu := h.add(h.x.SwiGLU(gateT, upT))
			dgate, dup, back := h.x.SwiGLUBack(gateT, upT, v)
			dgateFused, dupFused, backFused := h.x.SwiGLUBackQuantize(gateT, upT, v)
			h.nodes = append(h.nodes, back, backFused)
			type pair struct {
				name        string
				fused, want Tensor
			}
			pairs := []pair{
				{"norm, bytes", h.x.NormQuantizeBytes(v, g, 1e-5), h.x.QuantizeBytes(norm)},
				{"swiglu, bytes", h.x.SwiGLUQuantizeBytes(gu), h.x.QuantizeBytes(swiglu)},
				{"norm, packed", h.x.NormQuantize(v, g, 1e-5), h.x.Quantize(norm)},
				{"swiglu, packed", h.x.SwiGLUQuantize(gu, Tensor{}), h.x.Quantize(swiglu)},
				{"swiglu apart, packed", h.x.SwiGLUQuantize(gateT, upT), h.x.Quantize(swiglu)},
				{"gradient of gate, packed", dgateFused, h.x.Quantize(dgate)},
				{"gradient of up, packed", dupFused, h.x.Quantize(dup)},
			}
			for _, p := range pairs {
				h.nodes = append(h.nodes, p.fused, p.want)
			}
			h.run()
			for _, p := range pairs {
				a, b := p.fused.Bytes(p.fused.Elements()), p.want.Bytes(p.want.Elements())
				// A matrix begins at the first multiple of 64 bytes and takes all but 64.
				a, b = a[-uintptr(unsafe.Pointer(&a[0]))%64:][:len(a)-64], b[-uintptr(unsafe.Pointer(&b[0]))%64:][:len(b)-64]
				if !bytes.Equal(a, b) {
					t.Fatalf("%d x %d, %d threads: %s: the bytes of one node and of two differ", s.in, s.tokens, threads, p.name)
				}
			}
		}
	}
}

// Builds for other instruction sets must give the same bits: those of AVX-512, of AVX2, and of plain C, which reads
// like the definition.
func TestRepackedInstructionSets(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		t.Skip("compares instruction sets of amd64")
	}
	compiler := os.Getenv("CC")
	if compiler == "" {
		compiler = "cc"
	}
	var want []byte
	for i, target := range []string{"x86-64", "x86-64-v3", "native"} {
		program := filepath.Join(t.TempDir(), fmt.Sprint("repacked", i))
		args := []string{"-O1", "-march=" + target, "testdata/repacked_main.c", "-o", program, "-lm"}
		if out, err := exec.Command(compiler, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		got, err := exec.Command(program).Output()
		if err != nil {
			if i > 0 && !HasVNNI() {
				continue // a processor without AVX2
			}
			t.Fatalf("%s: %v", target, err)
		}
		if i == 0 {
			want = got
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s computes other bits than plain C", target)
		}
	}
}

// BenchmarkRepacked times products of the default model's shapes, the rounding of x included, against ggml's own and
// the packed int16 product of the same matrix, one after the other, best of b.N rounds with 2 threads. Up to 16 tokens
// the weights are read from memory: there are as many matrices as lie outside of the caches, and a round uses all.
func BenchmarkRepacked(b *testing.B) {
	const threads, outside = 2, 80 << 20
	for _, s := range []struct {
		in, out int
		stored  Type
	}{{576, 576, 3}, {576, 192, 3}, {576, 960, 3}, {576, 1536, 3}, {576, 3072, 3}, {1536, 576, 3}, {576, 49152, Q8_0}} {
		values := make([]float32, s.in*s.out)
		copy(values, normal(1, min(len(values), 1<<20)))
		stored := make(map[Type][]byte)
		for _, t := range []Type{2, 3, Q8_0} {
			stored[t] = storedBytes(values, t)
		}
		for _, tokens := range []int{1, 2, 4, 8, 16, 64, 128, 512} {
			if s.out > 8192 && tokens > 64 {
				continue
			}
			b.Run(fmt.Sprintf("%dx%dx%d", s.in, s.out, tokens), func(b *testing.B) {
				k, _ := RepackedKind(s.stored)
				type contender struct {
					name  string
					bytes int
					node  func(x *Context, v Tensor) (node Tensor, set func())
				}
				plain := func(name string, t Type) contender {
					return contender{name, len(stored[t]), func(x *Context, v Tensor) (Tensor, func()) {
						w := x.New(t, s.in, s.out)
						return x.MulMat(w, v), func() { copy(w.Bytes(len(stored[t])), stored[t]) }
					}}
				}
				contenders := []contender{
					{"repacked", RepackedBytes(k, s.in, s.out), func(x *Context, v Tensor) (Tensor, func()) {
						w := x.New(I8, RepackedBytes(k, s.in, s.out))
						return x.RepackedMatMul(w, x.QuantizeBytes(v), Tensor{}, k, s.in, s.out, tokens), func() { w.SetRepacked(stored[s.stored], s.stored, 0, s.in, s.out) }
					}},
					{"packed", PackedBytes(s.in, s.out), func(x *Context, v Tensor) (Tensor, func()) {
						w := x.New(I8, PackedBytes(s.in, s.out))
						return x.PackedMatMul(w, x.Quantize(v), Tensor{}, s.in, s.out, tokens), func() { w.SetPackedRows(values, 0, s.in, s.out) }
					}},
					plain("q4_0", 2), plain("q4_1", 3), plain("q8_0", Q8_0),
				}
				best := make([]time.Duration, len(contenders))
				copies := make([]int, len(contenders))
				rounds := make([]func(), len(contenders))
				for i, c := range contenders {
					copies[i] = 1
					if tokens <= 16 {
						copies[i] += outside / c.bytes
					}
					backend, err := NewCPU(threads)
					if err != nil {
						b.Fatal(err)
					}
					b.Cleanup(backend.Close)
					x := NewContext(4*copies[i]+8, 4*copies[i])
					b.Cleanup(x.Free)
					graph, v := x.NewGraph(4*copies[i]), x.New(F32, s.in, tokens)
					var sets []func()
					for range copies[i] {
						node, set := c.node(x, v)
						graph.Add(node)
						sets = append(sets, set)
					}
					memory, err := syscall.Mmap(-1, 0, x.MemoryBytes(), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
					if err != nil {
						b.Fatal(err)
					}
					b.Cleanup(func() { _ = syscall.Munmap(memory) })
					HugePages(memory)
					x.Place(memory)
					copy(v.Floats(), normal(2, s.in*tokens))
					for _, set := range sets {
						set()
					}
					allocator := backend.NewAllocator()
					b.Cleanup(allocator.Free)
					rounds[i] = func() {
						start := time.Now()
						if err := backend.Compute(graph, allocator); err != nil {
							b.Fatal(err)
						}
						if d := time.Since(start) / time.Duration(copies[i]); best[i] == 0 || d < best[i] {
							best[i] = d
						}
					}
				}
				for b.Loop() {
					for _, round := range rounds {
						round()
					}
				}
				flops := 2 * float64(s.in) * float64(s.out) * float64(tokens)
				b.ReportMetric(flops/best[0].Seconds()/1e9, "GF/s")
				if tokens <= 16 {
					b.ReportMetric(float64(contenders[0].bytes)/best[0].Seconds()/1e9, "GB/s")
				}
				for i, c := range contenders[1:] {
					b.ReportMetric(best[i+1].Seconds()/best[0].Seconds(), "x-"+c.name)
				}
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
