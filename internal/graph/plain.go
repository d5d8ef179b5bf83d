package graph

import (
	"math"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// plain are the blocks of every device: ggml's own operations, only such as the CUDA, ROCm, Vulkan and Metal backends
// have or that are composed of those (plain_test.go holds the table). On the CPU they are the reference of the fused
// ones, and several times slower.
//
// ROCm and CUDA multiply float32 operands in TF32, with a relative error of 5e-4: LoRA, attention and, with float32
// weights, everything.
type plain struct {
	backend  *ggml.Backend
	masks    *masks
	composed bool // of MulMat and Transpose is what OutProduct would compute: the device lacks it

	// of one step
	grouping    grouping
	mask        ggml.Tensor // float32 [keys, queries, 1, groups], 0 or -inf
	queryRows   ggml.Tensor // int32: rows of q [d, heads*T] that make [d, queries, heads, groups]
	keyRows     ggml.Tensor
	queryPlaces ggml.Tensor // int32: rows of [d, queries*heads*groups] that make [d, heads, T]
	keyPlaces   ggml.Tensor
	copyPlaces  ggml.Tensor // int32: all copies of keys that have several, [heads*copies]
	copySums    ggml.Tensor // float32 [copies, copied]: 1 where the copy is of the token
	copied      ggml.Tensor // int32 [copied]

	maskRows                   ggml.Tensor              // int32 [T, parts]: rows of the pool
	labelRows, labelColumns    ggml.Tensor              // int32 [targets]: index of the label in its chunk's logits, and of its column
	labelWeights, columnWeight ggml.Tensor              // float32, scaled: [targets], and their sums [1, positions]
	picked                     ggml.Tensor              // what pick took from
	drops                      map[int]ggml.Tensor      // dropout(x) of each part's loraDown, for its gradients
	gathered                   map[ggml.Tensor]gathered // of the q of each attention
}

// gathered are the operands of an attention, by group.
type gathered struct{ q, k, v ggml.Tensor }

func newPlain(backend *ggml.Backend) *plain {
	p := &plain{backend: backend, masks: &masks{}}
	x := ggml.NewContext(4, 0)
	defer x.Free()
	p.composed = !backend.Supports(x.OutProduct(x.New(ggml.F32, 8, 8), x.TransposedView(x.New(ggml.F32, 8, 8))))
	return p
}

// across is the sum over k of a[:, k] (outer) b[:, k]: a [n, k], b [m, k] -> [n, m].
func (p *plain) across(s *step, a, b ggml.Tensor) ggml.Tensor {
	if p.composed {
		return s.ctx.MulMat(s.ctx.Transpose(a), s.ctx.Transpose(b))
	}
	return s.ctx.OutProduct(a, b)
}

// along is the sum over k of a[:, k] (outer) b[k, :]: a [n, k], b [k, m] -> [n, m].
func (p *plain) along(s *step, a, b ggml.Tensor) ggml.Tensor {
	if p.composed {
		return s.ctx.MulMat(s.ctx.Transpose(a), b)
	}
	return s.ctx.OutProduct(a, s.ctx.TransposedView(b))
}

// limits lets the head take about 256 MiB of logits at once.
func (p *plain) limits(vocabulary int) limits {
	return limits{nodesPerLayer: 600, headTokens: min(1024, max(128, 1<<26/vocabulary/128*128))}
}

func (p *plain) memory() int {
	if p.masks.buffer == nil {
		return 0
	}
	return p.masks.buffer.Size()
}

func (p *plain) close() { p.masks.free() }

func (p *plain) begin(s *step, b engine.Batch, inputs *ggml.Context) (blocks, func(), error) {
	if s.seeds.Valid() {
		width := 0
		for _, part := range s.lora.Parts {
			width = max(width, part.In)
		}
		if err := p.masks.make(p.backend, s.lora.Dropout, width); err != nil {
			return nil, nil, err
		}
	}
	t, n := s.tokens, len(b.Targets)
	h := s.Heads
	g := group(b.Segments, maxBatch/h.KeyValue)
	p = &plain{
		backend: p.backend, masks: p.masks, composed: p.composed, grouping: g,
		drops: make(map[int]ggml.Tensor), gathered: make(map[ggml.Tensor]gathered),
	}
	p.mask = inputs.New(ggml.F32, g.keys, g.queries, 1, g.groups)
	integers := func(values []int32) (ggml.Tensor, func()) {
		tensor := inputs.New(ggml.I32, len(values))
		return tensor, func() { tensor.SetInts(values) }
	}
	fills := make([]func(), 0, 12)
	add := func(into *ggml.Tensor, values []int32) {
		tensor, fill := integers(values)
		*into = tensor
		fills = append(fills, fill)
	}
	add(&p.queryRows, rows(g.query, g.groups, h.Query))
	add(&p.keyRows, rows(g.key, g.groups, h.KeyValue))
	add(&p.queryPlaces, places(g.querySlot, g.queries, h.Query))
	add(&p.keyPlaces, places(g.keySlot, g.keys, h.KeyValue))
	fills = append(fills, func() {
		values := make([]float32, len(g.allowed))
		for i, allowed := range g.allowed {
			if !allowed {
				values[i] = float32(math.Inf(-1))
			}
		}
		p.mask.SetFloats(values)
	})
	if len(g.copied) > 0 {
		all := slices.Concat(g.copies...)
		add(&p.copyPlaces, places(all, g.keys, h.KeyValue))
		add(&p.copied, ints(g.copied))
		p.copySums = inputs.New(ggml.F32, len(all), len(g.copied))
		fills = append(fills, func() {
			values := make([]float32, len(all)*len(g.copied))
			at := 0
			for i, copies := range g.copies {
				for range copies {
					values[i*len(all)+at] = 1
					at++
				}
			}
			p.copySums.SetFloats(values)
		})
	}
	if s.seeds.Valid() {
		values := make([]int32, 0, t*len(s.lora.Parts))
		for _, part := range s.lora.Parts {
			for _, seed := range b.Seeds {
				values = append(values, maskRow(seed, part.Layer*int(modules)+int(part.Module)))
			}
		}
		add(&p.maskRows, values)
	}
	labels, columns := make([]int32, n), make([]int32, n)
	for _, c := range s.targets.chunks {
		column := -1
		for i := c.from; i < c.from+c.targets; i++ {
			if i == c.from || b.Targets[i].Position != b.Targets[i-1].Position {
				column++
			}
			columns[i] = int32(column)
			labels[i] = int32(column*s.Vocabulary) + int32(b.Targets[i].Label)
		}
	}
	add(&p.labelRows, labels)
	add(&p.labelColumns, columns)
	p.labelWeights = inputs.New(ggml.F32, n)
	p.columnWeight = inputs.New(ggml.F32, s.targets.index.Size(0))
	return p, func() {
		for _, fill := range fills {
			fill()
		}
	}, nil
}

func (p *plain) weigh(s *step, b engine.Batch, weights []float32) {
	scaled, columns := make([]float32, len(weights)), make([]float32, s.targets.index.Size(0))
	column := -1
	for i, w := range weights {
		if i == 0 || b.Targets[i].Position != b.Targets[i-1].Position {
			column++
		}
		scaled[i] = w * s.scale
		columns[column] += scaled[i]
	}
	p.labelWeights.SetFloats(scaled)
	p.columnWeight.SetFloats(columns)
}

// input converts x once for all F16 weights that multiply it, as each product would.
func (p *plain) input(s *step, w weight, x ggml.Tensor) input {
	in := input{x, x.Size(1)}
	if w.kind == ggml.F16 && p.backend.GPU() {
		in.t = s.add(s.ctx.Convert(x, w.kind))
	}
	return in
}

func (p *plain) normInput(s *step, w weight, x, gamma ggml.Tensor) input {
	return p.input(s, w, p.rmsNorm(s, x, gamma))
}

func (p *plain) swigluInput(s *step, w weight, gate, up ggml.Tensor) input {
	return p.input(s, w, p.swiglu(s, gate, up))
}

func (p *plain) swigluBackInputs(s *step, w weight, gate, up, dy ggml.Tensor) (dgate, dup input) {
	g, u := p.swigluBack(s, gate, up, dy)
	return p.input(s, w, g), p.input(s, w, u)
}

func (*plain) hold(_ *step, w weight) weight { return w }

// Sums are added to the graph by what uses them, so that those of several terms stand one after the other: CUDA computes
// them at once, if the earlier sum is the first operand.

func (*plain) matmul(s *step, w weight, x input, residual ggml.Tensor) ggml.Tensor {
	var y ggml.Tensor
	if w.transpose {
		y = s.ctx.OutProduct(w.t, s.ctx.TransposedView(x.t))
	} else {
		y = s.ctx.MulMat(w.t, x.t)
	}
	if w.forward {
		s.ctx.Precise(y)
	}
	s.add(y)
	if residual.Valid() {
		y = s.ctx.Add(residual, y)
	}
	return y
}

func (*plain) rmsNorm(s *step, x, gamma ggml.Tensor) ggml.Tensor {
	return s.ctx.Mul(s.ctx.Norm(x, s.Epsilon), gamma) // added by what uses it, if anything does
}

// keepOnCPU keeps the memory of a node whose place the CPU's gradient operations may not take: they read it after they
// have begun to write. Those of the other backends compute each element or row before they write it.
func (p *plain) keepOnCPU(s *step, t ggml.Tensor) {
	if !p.backend.GPU() {
		s.ctx.Keep(t)
	}
}

func (p *plain) rmsNormBack(s *step, x, gamma, dy, residual ggml.Tensor) ggml.Tensor {
	scaled := s.ctx.Mul(dy, gamma)
	p.keepOnCPU(s, scaled) // NormBack may not take its place
	dx := s.ctx.NormBack(scaled, x, s.Epsilon)
	if residual.Valid() {
		dx = s.ctx.Add(dx, residual)
	}
	return s.add(dx)
}

func (*plain) swiglu(s *step, gate, up ggml.Tensor) ggml.Tensor {
	return s.add(s.ctx.Gate(gate, up))
}

func (*plain) swigluBack(s *step, gate, up, dy ggml.Tensor) (dgate, dup ggml.Tensor) {
	dup = s.add(s.ctx.Gate(gate, dy))
	return s.add(s.ctx.SiluBack(s.ctx.Mul(dy, up), gate)), dup
}

// gather makes [d, slots, heads*groups] of x [d*heads, T].
func (p *plain) gather(s *step, x, rows ggml.Tensor, heads, slots int) ggml.Tensor {
	d := s.Heads.Size
	all := s.ctx.GetRows(s.ctx.View(x, 0, d, heads*s.tokens), rows)
	return s.ctx.View(s.add(all), 0, d, slots, heads*p.grouping.groups)
}

func (p *plain) queries(s *step, q ggml.Tensor) ggml.Tensor {
	// The query heads of a group share a key-value head: one product takes them together.
	share := s.Heads.Query / s.Heads.KeyValue
	return s.ctx.View(p.gather(s, q, p.queryRows, s.Heads.Query, p.grouping.queries), 0,
		s.Heads.Size, p.grouping.queries*share, s.Heads.KeyValue*p.grouping.groups)
}

func (p *plain) keys(s *step, k ggml.Tensor) ggml.Tensor {
	return p.gather(s, k, p.keyRows, s.Heads.KeyValue, p.grouping.keys)
}

func (p *plain) softScale(s *step) float32 {
	return float32(1 / math.Sqrt(float64(s.Heads.Size)))
}

// probabilities are softmax(q k^T / sqrt(d)), [keys, queries, heads, groups].
func (p *plain) probabilities(s *step, q, k ggml.Tensor) ggml.Tensor {
	g := p.grouping
	scores := s.ctx.Reshape(s.ctx.MulMat(k, q), g.keys, g.queries, s.Heads.Query, g.groups)
	result := s.add(s.ctx.SoftMax(scores, p.mask, p.softScale(s)))
	p.keepOnCPU(s, result) // SoftMaxBack may not take its place
	return result
}

// attention keeps the probabilities unless they take more memory than half of the other activations of a layer.
func (p *plain) attention(s *step, q, k, v ggml.Tensor) (out, keep ggml.Tensor) {
	g, h := p.grouping, s.Heads
	operands := gathered{p.queries(s, q), p.keys(s, k), p.keys(s, v)}
	p.gathered[q] = operands
	probabilities := p.probabilities(s, operands.q, operands.k)
	share := h.Query / h.KeyValue
	flat := s.ctx.View(probabilities, 0, g.keys, g.queries*share, h.KeyValue*g.groups)
	values := p.along(s, operands.v, flat)
	out = s.ctx.GetRows(s.ctx.View(values, 0, h.Size, g.queries*h.Query*g.groups), p.queryPlaces)
	out = s.ctx.View(s.add(out), 0, h.Size*h.Query, s.tokens)
	if g.keys*g.queries*g.groups*h.Query <= s.tokens*(s.Embedding+s.FeedForward) {
		keep = probabilities
	}
	return out, keep
}

func (p *plain) attentionBack(s *step, q, _, _, keep, dout ggml.Tensor) (dq, dk, dv ggml.Tensor) {
	g, h := p.grouping, s.Heads
	share := h.Query / h.KeyValue
	batch := h.KeyValue * g.groups
	operands := p.gathered[q]
	queries, keys, douts := operands.q, operands.k, p.queries(s, dout)
	if !keep.Valid() {
		keep = p.probabilities(s, queries, keys)
	}
	flat := s.ctx.View(keep, 0, g.keys, g.queries*share, batch)
	dv = s.add(p.across(s, douts, flat))
	dprobabilities := s.ctx.Reshape(s.ctx.MulMat(operands.v, douts), g.keys, g.queries, h.Query, g.groups)
	dscores := s.ctx.View(s.add(s.ctx.SoftMaxBack(dprobabilities, keep, p.softScale(s))), 0, g.keys, g.queries*share, batch)
	dqueries := p.along(s, keys, dscores)
	dq = s.ctx.GetRows(s.ctx.View(dqueries, 0, h.Size, g.queries*h.Query*g.groups), p.queryPlaces)
	dq = s.ctx.View(s.add(dq), 0, h.Size*h.Query, s.tokens)
	dk = s.add(p.across(s, queries, dscores))
	return dq, p.sumKeys(s, dk), p.sumKeys(s, dv)
}

// sumKeys makes [d*heads, T] of the gradients of all copies of the keys, [d, keys, heads*groups].
func (p *plain) sumKeys(s *step, gradient ggml.Tensor) ggml.Tensor {
	g, h := p.grouping, s.Heads
	all := s.ctx.View(gradient, 0, h.Size, g.keys*h.KeyValue*g.groups)
	out := s.ctx.View(s.add(s.ctx.GetRows(all, p.keyPlaces)), 0, h.Size*h.KeyValue, s.tokens)
	if len(g.copied) == 0 {
		return out
	}
	copies := s.ctx.View(s.ctx.GetRows(all, p.copyPlaces), 0, h.Size*h.KeyValue, p.copySums.Size(0))
	return s.add(s.ctx.SetRows(out, p.along(s, copies, p.copySums), p.copied))
}

// index finds the part among those with dropout.
func (p *plain) index(s *step, drop *Part) (int, bool) {
	if drop == nil || !s.seeds.Valid() {
		return 0, false
	}
	return slices.IndexFunc(s.lora.Parts, func(q Part) bool { return q.Layer == drop.Layer && q.Module == drop.Module }), true
}

// dropout multiplies x [width, T] by the masks of a part. They are gathered again where they are needed again: CUDA does
// so on the way.
func (p *plain) dropout(s *step, x ggml.Tensor, index, width int) ggml.Tensor {
	pool := p.masks.pool
	row := pool.Size(0)
	part := s.ctx.Strided(pool, 0, [4]int{width, maskPool, 1, 1}, [3]int{row, row * maskPool, row * maskPool})
	return s.ctx.Mul(x, s.ctx.GetRows(part, s.ctx.View(p.maskRows, index*s.tokens, s.tokens)))
}

// loraDown returns scale * w dropout(x): in both directions, whatever takes it wants it scaled once.
func (p *plain) loraDown(s *step, x, w ggml.Tensor, drop *Part) ggml.Tensor {
	if index, ok := p.index(s, drop); ok {
		x = p.dropout(s, x, index, drop.In)
		p.drops[index] = x
	}
	return s.add(s.ctx.Scale(s.ctx.MulMat(w, x), float32(s.lora.Scale()), 0))
}

func (p *plain) loraUp(s *step, y, u, w ggml.Tensor, drop *Part) ggml.Tensor {
	z := p.along(s, w, u)
	if index, ok := p.index(s, drop); ok {
		z = p.dropout(s, z, index, drop.In)
	}
	return s.ctx.Add(y, s.add(z))
}

func (p *plain) loraOuter(s *step, gradient, u, x ggml.Tensor, drop *Part) {
	if index, ok := p.index(s, drop); ok {
		x = p.drops[index]
	}
	s.add(s.ctx.AddInPlace(gradient, p.across(s, x, u)))
}

func (p *plain) pick(s *step, x, index ggml.Tensor) ggml.Tensor {
	p.picked = x
	return s.add(s.ctx.GetRows(x, index))
}

// scatter needs no sum: a position is in one chunk, once.
func (p *plain) scatter(s *step, dx, v, index ggml.Tensor, _ int) ggml.Tensor {
	if !dx.Valid() {
		dx = s.ctx.Scale(p.picked, 0, 0)
	}
	return s.add(s.ctx.SetRows(dx, v, index))
}

// smallestProbability keeps losses finite: 83 nats, where float32 has no smaller normal numbers.
const smallestProbability = 1e-36

func (p *plain) loss(s *step, logits ggml.Tensor, c chunk, backward bool) ggml.Tensor {
	v := s.Vocabulary
	probabilities := s.add(s.ctx.SoftMax(logits, ggml.Tensor{}, 1))
	labels := s.ctx.View(p.labelRows, c.from, c.targets)
	flat := func(t ggml.Tensor) ggml.Tensor { return s.ctx.View(t, 0, 1, v*c.positions) }
	label := s.ctx.LogAtLeast(s.ctx.GetRows(flat(probabilities), labels), smallestProbability)
	largest := s.ctx.GetRows(s.ctx.View(probabilities, 0, 1, v, c.positions), s.ctx.View(s.ctx.ArgMax(probabilities), 0, 1, c.positions))
	best := s.ctx.GetRows(s.ctx.View(largest, 0, 1, c.positions), s.ctx.View(p.labelColumns, c.from, c.targets))
	// 1 where the label is the most likely, less otherwise.
	correct := s.ctx.Scale(s.ctx.Sub(label, s.ctx.LogAtLeast(best, smallestProbability)), 1, 1)
	stats := s.ctx.Concat(s.ctx.Scale(label, -1, 0), correct, 0)
	s.add(s.ctx.Copy(stats, s.ctx.View(s.targets.stats, 2*c.from, 2, c.targets)))
	if !backward {
		return ggml.Tensor{}
	}
	gradient := s.add(s.ctx.Mul(probabilities, s.ctx.View(p.columnWeight, c.fromPosition, 1, c.positions)))
	hit := s.ctx.Sub(s.ctx.GetRows(flat(gradient), labels), s.ctx.View(p.labelWeights, c.from, 1, c.targets))
	return s.ctx.View(s.add(s.ctx.SetRows(flat(gradient), hit, labels)), 0, v, c.positions)
}
