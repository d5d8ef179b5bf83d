package graph

import (
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// headTokens is how many positions the head takes at once: its logits are headTokens x vocabulary float32 values.
const headTokens = 128

// nodesPerLayer bounds the graph's nodes (operations and views) of a layer, forward and backward.
const nodesPerLayer = 200

// step is the graph of one micro-batch while it is built.
type step struct {
	*Model
	lora  *LoRA
	train bool
	scale float32

	ctx       *ggml.Context
	graph     *ggml.Graph
	positions ggml.Tensor
	segments  ggml.Tensor
	seeds     ggml.Tensor
	rope      ggml.Rope
	tokens    int
}

// saved is what the backward pass of a layer needs from its forward pass.
type saved struct {
	x, middle ggml.Tensor // input of the attention half and of the feed-forward half
	q, k, v   ggml.Tensor // after rotation
	attended  ggml.Tensor
	gate, up  ggml.Tensor
	down      [modules]ggml.Tensor // A x of each trained module
}

// Gradients runs the micro-batch forward and backward and adds the gradient of scale * sum(weight * loss) to
// lora.Gradients. It returns ggml.ErrAborted after Backend.Abort and ggml.ErrMemory; both leave lora.Gradients half
// changed.
func (m *Model) Gradients(b engine.Batch, lora *LoRA, scale float32) (engine.Result, error) {
	result, _, err := m.run(b, lora, true, scale, false)
	return result, err
}

// Evaluate runs the micro-batch forward. A nil lora evaluates the base model.
func (m *Model) Evaluate(b engine.Batch, lora *LoRA) (engine.Result, error) {
	result, _, err := m.run(b, lora, false, 1, false)
	return result, err
}

// Logits returns the logits of each target's position, [targets][vocabulary].
func (m *Model) Logits(b engine.Batch, lora *LoRA) ([][]float32, error) {
	_, logits, err := m.run(b, lora, false, 1, true)
	return logits, err
}

func (m *Model) run(b engine.Batch, lora *LoRA, train bool, scale float32, wantLogits bool) (engine.Result, [][]float32, error) {
	if err := b.Validate(m.Vocabulary); err != nil {
		return engine.Result{}, nil, err
	}
	t, n := len(b.Tokens), len(b.Targets)
	distinct := 1 // positions of targets: the logits of each are computed once
	for i := 1; i < n; i++ {
		if b.Targets[i].Position != b.Targets[i-1].Position {
			distinct++
		}
	}
	inputs := ggml.NewContext(16, 0)
	defer inputs.Free()
	tokens := inputs.New(ggml.I32, t)
	positions := inputs.New(ggml.I32, t)
	segments := inputs.New(ggml.I32, 3, len(b.Segments))
	index := inputs.New(ggml.I32, distinct)
	columns := inputs.New(ggml.I32, n)
	labels := inputs.New(ggml.I32, n)
	weights := inputs.New(ggml.F32, n)
	stats := inputs.New(ggml.F32, 2, n)
	var seeds, logits ggml.Tensor
	if b.Seeds != nil && lora != nil && lora.Dropout > 0 {
		seeds = inputs.New(ggml.I32, t)
	}
	if wantLogits {
		logits = inputs.New(ggml.F32, m.Vocabulary, distinct)
	}
	buffer, err := inputs.Allocate(m.backend)
	if err != nil {
		return engine.Result{}, nil, err
	}
	defer buffer.Free()
	for i, token := range b.Tokens {
		tokens.Ints()[i] = int32(token)
	}
	for i, position := range b.Positions() {
		positions.Ints()[i] = int32(position)
	}
	for i, segment := range b.Segments {
		copy(segments.Ints()[3*i:], []int32{int32(segment.Start), int32(segment.End), int32(segment.Parent)})
	}
	column := 0
	for i, target := range b.Targets {
		if i > 0 && target.Position != b.Targets[i-1].Position {
			column++
		}
		index.Ints()[column], columns.Ints()[i] = int32(target.Position), int32(column)
		labels.Ints()[i], weights.Floats()[i] = int32(target.Label), target.Weight
	}
	if seeds.Valid() {
		for i, seed := range b.Seeds {
			seeds.Ints()[i] = int32(seed)
		}
	}

	nodes := m.Layers*nodesPerLayer + 40*(distinct/headTokens+2)
	s := &step{
		Model: m, lora: lora, train: train, scale: scale, tokens: t,
		ctx: ggml.NewContext(nodes, nodes), positions: positions, segments: segments, seeds: seeds,
		rope: ggml.Rope{Dimensions: m.RopeDimensions, Base: m.RopeBase, Scale: m.RopeScale, Factors: m.ropeFactors},
	}
	defer s.ctx.Free()
	s.graph = s.ctx.NewGraph(nodes)

	x := s.add(s.ctx.GetRows(m.embedding, tokens))
	layers := make([]saved, len(m.layers))
	for i := range m.layers {
		x = s.forward(i, x, &layers[i])
	}
	gradient := s.head(x, targets{index, columns, labels, weights, stats, logits})
	if train {
		for i := len(layers) - 1; i >= 0; i-- {
			gradient = s.backward(i, gradient, layers[i])
		}
	}
	if err := m.backend.Compute(s.graph, m.allocator); err != nil {
		return engine.Result{}, nil, err
	}
	result := engine.Result{Losses: make([]float32, n), Correct: make([]bool, n)}
	for i := range n {
		result.Losses[i], result.Correct[i] = stats.Floats()[2*i], stats.Floats()[2*i+1] == 1
	}
	var out [][]float32
	if wantLogits {
		for _, column := range columns.Ints() {
			out = append(out, append([]float32(nil), logits.Floats()[int(column)*m.Vocabulary:][:m.Vocabulary]...))
		}
	}
	return result, out, nil
}

func (s *step) add(t ggml.Tensor) ggml.Tensor { return s.graph.Add(t) }

func (s *step) dropout(p Part) ggml.Dropout {
	return ggml.Dropout{Seeds: s.seeds, Module: p.Layer*int(modules) + int(p.Module), P: s.lora.Dropout}
}

func (s *step) a(flat ggml.Tensor, p Part) ggml.Tensor {
	return s.ctx.View(flat, p.A, p.In, s.lora.PaddedRank)
}
func (s *step) b(flat ggml.Tensor, p Part) ggml.Tensor {
	return s.ctx.View(flat, p.B, p.Out, s.lora.PaddedRank)
}

// linear is W x + scale B A dropout(x); it keeps A dropout(x) in save.
func (s *step) linear(layer int, m Module, x ggml.Tensor, save *saved) ggml.Tensor {
	y := s.add(s.ctx.MulMat(s.layers[layer].linears[m].w, x))
	if p, ok := s.lora.part(layer, m); ok {
		save.down[m] = s.add(s.ctx.LoRADown(x, s.a(s.lora.parameters, p), s.dropout(p)))
		y = s.add(s.ctx.LoRAUp(y, save.down[m], s.b(s.lora.parameters, p), float32(s.lora.Scale()), ggml.Dropout{}))
	}
	return y
}

// linearBack adds the gradients of A and B and returns that of x, if wantInput.
func (s *step) linearBack(layer int, m Module, x, dy ggml.Tensor, save saved, wantInput bool) ggml.Tensor {
	p, trained := s.lora.part(layer, m)
	var du ggml.Tensor
	scale := float32(s.lora.Scale())
	if trained {
		du = s.add(s.ctx.LoRADown(dy, s.b(s.lora.parameters, p), ggml.Dropout{}))
		s.add(s.ctx.LoRAOuter(s.b(s.lora.gradients, p), save.down[m], dy, scale, ggml.Dropout{}))
		s.add(s.ctx.LoRAOuter(s.a(s.lora.gradients, p), du, x, scale, s.dropout(p)))
	}
	if !wantInput {
		return ggml.Tensor{}
	}
	dx := s.add(s.ctx.MulMat(s.layers[layer].linears[m].wt, dy))
	if trained {
		dx = s.add(s.ctx.LoRAUp(dx, du, s.a(s.lora.parameters, p), scale, s.dropout(p)))
	}
	return dx
}

// rotate applies rotary embedding to x [d*heads, T]; back is its gradient.
func (s *step) rotate(x ggml.Tensor, heads int, back bool) ggml.Tensor {
	d := s.Heads.Size
	cube := s.ctx.View(x, 0, d, heads, s.tokens)
	if back {
		cube = s.add(s.ctx.RopeBack(cube, s.positions, s.rope))
	} else {
		cube = s.add(s.ctx.Rope(cube, s.positions, s.rope))
	}
	return s.ctx.View(cube, 0, d*heads, s.tokens)
}

// forward is one block: x + o(attention(norm(x))), then + down(swiglu(norm(.))).
func (s *step) forward(i int, x ggml.Tensor, save *saved) ggml.Tensor {
	l := &s.layers[i]
	save.x = x
	normed := s.add(s.ctx.RMSNorm(x, l.attentionNorm, s.Epsilon))
	save.q = s.rotate(s.linear(i, Query, normed, save), s.Heads.Query, false)
	save.k = s.rotate(s.linear(i, Key, normed, save), s.Heads.KeyValue, false)
	save.v = s.linear(i, Value, normed, save)
	save.attended = s.add(s.ctx.Attention(save.q, save.k, save.v, s.segments, s.Heads))
	save.middle = s.add(s.ctx.Add(x, s.linear(i, Output, save.attended, save)))
	normed = s.add(s.ctx.RMSNorm(save.middle, l.feedForwardNorm, s.Epsilon))
	save.gate = s.linear(i, Gate, normed, save)
	save.up = s.linear(i, Up, normed, save)
	hidden := s.add(s.ctx.SwiGLU(save.gate, save.up))
	return s.add(s.ctx.Add(save.middle, s.linear(i, Down, hidden, save)))
}

// backward takes the gradient of a block's output and returns that of its input; layer 0 has none to give.
// Norms and SwiGLU are computed again, which is cheaper than keeping their output.
func (s *step) backward(i int, dy ggml.Tensor, save saved) ggml.Tensor {
	l := &s.layers[i]
	hidden := s.add(s.ctx.SwiGLU(save.gate, save.up))
	dhidden := s.linearBack(i, Down, hidden, dy, save, true)
	dgate, dup, node := s.ctx.SwiGLUBack(save.gate, save.up, dhidden)
	s.add(node)
	normed := s.add(s.ctx.RMSNorm(save.middle, l.feedForwardNorm, s.Epsilon))
	dnormed := s.add(s.ctx.Add(s.linearBack(i, Gate, normed, dgate, save, true), s.linearBack(i, Up, normed, dup, save, true)))
	dmiddle := s.add(s.ctx.RMSNormBack(save.middle, l.feedForwardNorm, dnormed, dy, s.Epsilon))

	dattended := s.linearBack(i, Output, save.attended, dmiddle, save, true)
	dq, dk, dv, node := s.ctx.AttentionBack(save.q, save.k, save.v, s.segments, dattended, s.Heads)
	s.add(node)
	dq = s.rotate(dq, s.Heads.Query, true)
	dk = s.rotate(dk, s.Heads.KeyValue, true)
	normed = s.add(s.ctx.RMSNorm(save.x, l.attentionNorm, s.Epsilon))
	below := i > 0
	dxq := s.linearBack(i, Query, normed, dq, save, below)
	dxk := s.linearBack(i, Key, normed, dk, save, below)
	dxv := s.linearBack(i, Value, normed, dv, save, below)
	if !below {
		return ggml.Tensor{}
	}
	dnormed = s.add(s.ctx.Add(s.add(s.ctx.Add(dxq, dxk)), dxv))
	return s.add(s.ctx.RMSNormBack(save.x, l.attentionNorm, dnormed, dmiddle, s.Epsilon))
}

// targets are the inputs and outputs of the head for n targets at c distinct positions.
type targets struct {
	index           ggml.Tensor // int32 [c] positions
	columns, labels ggml.Tensor // int32 [n]; columns says which of the c positions
	weights         ggml.Tensor // [n]
	stats           ggml.Tensor // [2, n] losses, and whether the label was the most likely
	logits          ggml.Tensor // [V, c], or none: not wanted
}

// head computes the losses of the targets (logits only where they are needed) and, when training, returns the gradient
// with respect to x [D, T].
func (s *step) head(x ggml.Tensor, t targets) ggml.Tensor {
	var dx ggml.Tensor
	column := t.columns.Ints()
	for from, first := 0, 0; from < t.index.Size(0); from += headTokens {
		count := min(headTokens, t.index.Size(0)-from)
		n := 0 // targets of the chunk
		for first+n < len(column) && int(column[first+n]) < from+count {
			n++
		}
		rows := s.ctx.View(t.index, from, count)
		picked := s.add(s.ctx.GetRows(x, rows))
		normed := s.add(s.ctx.RMSNorm(picked, s.norm, s.Epsilon))
		out := s.add(s.ctx.MulMat(s.Model.head.w, normed))
		if t.logits.Valid() {
			s.add(s.ctx.Copy(out, s.ctx.View(t.logits, from*s.Vocabulary, s.Vocabulary, count)))
		}
		columns, labels, stats := s.ctx.View(t.columns, first, n), s.ctx.View(t.labels, first, n), s.ctx.View(t.stats, 2*first, 2, n)
		weights := s.ctx.View(t.weights, first, n)
		first += n
		if !s.train {
			s.add(s.ctx.Losses(out, columns, labels, stats, from))
			continue
		}
		out = s.add(s.ctx.CrossEntropy(out, columns, labels, weights, stats, from, s.scale))
		dnormed := s.add(s.ctx.MulMat(s.Model.head.wt, out))
		dpicked := s.add(s.ctx.RMSNormBack(picked, s.norm, dnormed, ggml.Tensor{}, s.Epsilon))
		dx = s.add(s.ctx.ScatterRows(dx, dpicked, rows, s.tokens))
	}
	return dx
}
