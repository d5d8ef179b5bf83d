package graph

import (
	"fmt"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// step is the graph of one micro-batch while it is built.
type step struct {
	*Model
	blocks blocks // of this step
	lora   *LoRA
	train  bool
	scale  float32
	batch  engine.Batch

	inputs    *ggml.Context
	buffer    *ggml.Buffer // of the inputs
	setInputs func()       // gives the inputs their values
	cut       int          // what build returns
	embedded  ggml.Tensor  // tokens, int32 [T]

	ctx       *ggml.Context
	graph     *ggml.Graph
	positions ggml.Tensor // of every token in its row, int32 [T]
	segments  ggml.Tensor // int32 [3, n]: start, end, parent
	seeds     ggml.Tensor // int32 [T], or none without dropout
	rope      ggml.Rope
	tokens    int
	targets   targets

	// The last layer computes its output projection and its feed-forward half for some positions only, if that is
	// worth while: those that have targets. Their index is then that of taken, and targets.index counts them.
	prune bool
	taken ggml.Tensor // int32 [positions]
	left  ggml.Tensor // seeds of the positions, int32, or none
}

// targets are the inputs and outputs of the head: the distinct positions that have targets, in order, and for each
// target the column of its position among them, its label, weight and results.
type targets struct {
	index, columns, labels, weights ggml.Tensor // int32 [positions]; int32, int32, float32 [targets]
	stats                           ggml.Tensor // [2, targets]: loss, correct
	logits                          ggml.Tensor // [V, positions], or none
	chunks                          []chunk
}

// saved is what the backward pass of a layer needs from its forward pass.
type saved struct {
	x, middle ggml.Tensor          // input of the attention half and of the feed-forward half
	unnormed  [modules]ggml.Tensor // q and k before the norm of their heads, where there is one
	q, k, v   ggml.Tensor          // after rotation
	keep      ggml.Tensor          // of attention
	attended  ggml.Tensor
	gate, up  ggml.Tensor
	down      [modules]ggml.Tensor // A x of each trained module
}

// Gradients runs the micro-batch forward and backward and adds the gradient of scale * sum(weight * loss) to
// lora.Gradients. It returns ggml.ErrAborted after Backend.Abort, ggml.ErrMemory and the error of Batch.Weigh; the
// first leaves lora.Gradients half changed, the others as they were.
func (m *Model) Gradients(b engine.Batch, lora *LoRA, scale float32) (engine.Result, error) {
	result, _, err := m.run(b, lora, true, scale, false)
	return result, err
}

// Evaluate runs the micro-batch forward. A nil lora evaluates the base model.
func (m *Model) Evaluate(b engine.Batch, lora *LoRA) (engine.Result, error) {
	result, _, err := m.run(b, lora, false, 1, false)
	return result, err
}

// Profile computes what Gradients does, node by node, and returns what each kind of node costs: see ggml.Backend.Profile.
func (m *Model) Profile(b engine.Batch, lora *LoRA) (map[string]ggml.Cost, error) {
	var costs map[string]ggml.Cost
	m.costs = &costs
	_, _, err := m.run(b, lora, true, 1, false)
	m.costs = nil
	return costs, err
}

// Logits returns the logits of each distinct position that has targets, [positions][vocabulary].
func (m *Model) Logits(b engine.Batch, lora *LoRA) ([][]float32, error) {
	_, logits, err := m.run(b, lora, false, 1, true)
	return logits, err
}

func (m *Model) run(b engine.Batch, lora *LoRA, train bool, scale float32, wantLogits bool) (engine.Result, [][]float32, error) {
	if err := b.Validate(m.Vocabulary); err != nil {
		return engine.Result{}, nil, err
	}
	var s *step
	if train {
		s = m.foreseen(b, lora, scale)
	}
	if s == nil {
		var err error
		if s, err = m.makeStep(b, lora, train, scale, wantLogits); err != nil {
			return engine.Result{}, nil, err
		}
	}
	defer s.free()
	lora.toDevice(train)
	if m.inspect != nil {
		m.inspect(s.graph)
	}
	if train {
		m.beginAhead()
	}
	var err error
	result := engine.Result{Losses: make([]float32, len(b.Targets)), Correct: make([]bool, len(b.Targets))}
	if m.costs != nil {
		*m.costs, err = m.backend.Profile(s.graph, m.allocator)
	} else {
		err = m.backend.ComputeParts(s.graph, m.allocator, s.cut, func() error { return s.weigh(result) })
	}
	if err != nil {
		return engine.Result{}, nil, err
	}
	if train {
		lora.fromDevice()
	}
	s.read(result)
	var out [][]float32
	if wantLogits {
		values := make([]float32, s.targets.logits.Elements())
		s.targets.logits.GetFloats(values)
		out = slices.Collect(slices.Chunk(values, m.Vocabulary))
	}
	return result, out, nil
}

// makeStep is a step that only lacks the memory of its nodes: its inputs have their values, and its graph is complete.
func (m *Model) makeStep(b engine.Batch, lora *LoRA, train bool, scale float32, wantLogits bool) (*step, error) {
	s, err := m.newStep(b, lora, train, scale, wantLogits)
	if err != nil {
		return nil, err
	}
	if s.buffer, err = s.inputs.Allocate(m.backend); err != nil {
		s.free()
		return nil, fmt.Errorf("inputs of a micro-batch: %w", err)
	}
	s.setInputs()
	s.cut = s.build()
	if err := m.backend.Check(s.graph); err != nil {
		s.free()
		return nil, err
	}
	return s, nil
}

// newStep describes the inputs of a micro-batch's graph; they have no memory yet.
func (m *Model) newStep(b engine.Batch, lora *LoRA, train bool, scale float32, wantLogits bool) (*step, error) {
	t, n := len(b.Tokens), len(b.Targets)
	limits := m.blocks.limits(m.Vocabulary)
	positions, columns, chunks := split(b.Targets, limits.headTokens)
	inputs := ggml.NewContext(16+extraInputs, 0)
	s := &step{
		Model: m, lora: lora, train: train, scale: scale, tokens: t, batch: b, inputs: inputs,
		embedded:  inputs.New(ggml.I32, t),
		positions: inputs.New(ggml.I32, t),
		segments:  inputs.New(ggml.I32, 3, len(b.Segments)),
		targets: targets{
			index: inputs.New(ggml.I32, len(positions)), columns: inputs.New(ggml.I32, n), labels: inputs.New(ggml.I32, n),
			weights: inputs.New(ggml.F32, n), stats: inputs.New(ggml.F32, 2, n), chunks: chunks,
		},
		rope: ggml.Rope{Dimensions: m.RopeDimensions, NeoX: m.architecture.neoX, Base: m.RopeBase, Scale: m.RopeScale, Factors: m.ropeFactors},
	}
	if b.Seeds != nil && lora != nil && lora.Dropout > 0 {
		s.seeds = inputs.New(ggml.I32, t)
	}
	if s.prune = limits.prune && 4*len(positions) <= 3*t; s.prune {
		s.taken = inputs.New(ggml.I32, len(positions))
		if s.seeds.Valid() {
			s.left = inputs.New(ggml.I32, len(positions))
		}
	}
	if wantLogits {
		s.targets.logits = inputs.New(ggml.F32, m.Vocabulary, len(positions))
	}
	own, fill, err := m.blocks.begin(s, b, inputs)
	if err != nil {
		s.free()
		return nil, err
	}
	s.blocks = own
	s.setInputs = func() {
		s.embedded.SetInts(ints(b.Tokens))
		s.positions.SetInts(ints(b.Positions()))
		var table []int32
		for _, segment := range b.Segments {
			table = append(table, int32(segment.Start), int32(segment.End), int32(segment.Parent))
		}
		s.segments.SetInts(table)
		index := ints(positions)
		if s.prune {
			s.taken.SetInts(index)
			if s.left.Valid() {
				left := make([]int32, len(index))
				for i, position := range index {
					left[i] = int32(b.Seeds[position])
				}
				s.left.SetInts(left)
			}
			for i := range index {
				index[i] = int32(i)
			}
		}
		s.targets.index.SetInts(index)
		s.targets.columns.SetInts(ints(columns))
		labels, weights := make([]int32, n), make([]float32, n)
		for i, target := range b.Targets {
			labels[i], weights[i] = int32(target.Label), target.Weight
		}
		s.targets.labels.SetInts(labels)
		s.blocks.weigh(s, b, weights)
		if s.seeds.Valid() {
			s.seeds.SetInts(ints(b.Seeds))
		}
		fill()
	}
	nodes := m.Layers*limits.nodesPerLayer + 60*(len(chunks)+2)
	if m.Recompute {
		nodes += m.Layers * limits.nodesPerLayer
	}
	s.ctx = ggml.NewContext(nodes, nodes)
	s.graph = s.ctx.NewGraph(nodes)
	return s, nil
}

func (s *step) free() {
	s.buffer.Free()
	s.inputs.Free()
	s.ctx.Free()
}

// build adds all nodes. The first cut of them compute the losses that Batch.Weigh wants to see before the others; with
// cut -1, nothing happens in between.
func (s *step) build() (cut int) {
	x := s.add(s.ctx.GetRows(s.embedding, s.embedded))
	layers := make([]saved, len(s.layers))
	for i := range s.layers {
		x = s.forward(i, x, &layers[i])
	}
	cut = -1
	if !s.train || s.batch.Weigh != nil {
		s.losses(x)
		cut = s.graph.Nodes()
	}
	if s.train {
		gradient := s.headGradient(x)
		for i := len(layers) - 1; i >= s.lora.lowest(); i-- {
			gradient = s.backward(i, gradient, layers[i])
		}
	}
	return cut
}

// weigh replaces the weights by those that Batch.Weigh makes of the losses.
func (s *step) weigh(result engine.Result) error {
	s.read(result)
	weights, err := s.batch.Weigh(result.Losses)
	if err != nil {
		return err
	}
	if len(weights) != len(s.batch.Targets) {
		return fmt.Errorf("micro-batch: %d weights for %d targets", len(weights), len(s.batch.Targets))
	}
	s.blocks.weigh(s, s.batch, weights)
	return nil
}

// read copies the targets' results to the host.
func (s *step) read(r engine.Result) {
	stats := make([]float32, 2*len(r.Losses))
	s.targets.stats.GetFloats(stats)
	for i := range r.Losses {
		r.Losses[i], r.Correct[i] = stats[2*i], stats[2*i+1] == 1
	}
}

// split finds the distinct positions of targets and, for each target, the index of its position among them.
func split(all []engine.Target, headTokens int) (positions, columns []int, chunks []chunk) {
	for i, target := range all {
		if i == 0 || target.Position != all[i-1].Position {
			if len(positions)%headTokens == 0 {
				chunks = append(chunks, chunk{fromPosition: len(positions), from: i})
			}
			positions = append(positions, target.Position)
		}
		c := &chunks[len(chunks)-1]
		c.positions, c.targets = len(positions)-c.fromPosition, i+1-c.from
		columns = append(columns, len(positions)-1)
	}
	return positions, columns, chunks
}

func ints[T ~int | ~int32 | ~uint32](values []T) []int32 {
	out := make([]int32, len(values))
	for i, v := range values {
		out[i] = int32(v)
	}
	return out
}

func (s *step) add(t ggml.Tensor) ggml.Tensor { return s.graph.Add(t) }

func (s *step) a(flat ggml.Tensor, p Part) ggml.Tensor {
	return s.ctx.View(flat, p.A, p.In, s.lora.PaddedRank)
}
func (s *step) b(flat ggml.Tensor, p Part) ggml.Tensor {
	return s.ctx.View(flat, p.B, p.Out, s.lora.PaddedRank)
}

// linear is W x + b + scale B A dropout(x), plus residual if that is valid; it keeps A dropout(x) in save. in is x as
// matmul takes it.
func (s *step) linear(layer int, m Module, x ggml.Tensor, in input, residual ggml.Tensor, save *saved) ggml.Tensor {
	l := &s.layers[layer]
	y := s.blocks.matmul(s, l.linears[m].w, in, residual)
	if l.bias[m].Valid() {
		y = s.add(s.ctx.Add(y, l.bias[m]))
	}
	if p, ok := s.lora.part(layer, m); ok {
		save.down[m] = s.blocks.loraDown(s, x, s.a(s.lora.parameters, p), &p)
		y = s.blocks.loraUp(s, y, save.down[m], s.b(s.lora.parameters, p), nil)
	}
	return y
}

// linearBack adds the gradients of A and B and returns that of x plus residual (if that is valid), if wantInput.
func (s *step) linearBack(layer int, m Module, x, dy, residual ggml.Tensor, save saved, wantInput bool) ggml.Tensor {
	p, trained := s.lora.part(layer, m)
	var du ggml.Tensor
	if trained {
		du = s.blocks.loraDown(s, dy, s.b(s.lora.parameters, p), nil)
		s.blocks.loraOuter(s, s.b(s.lora.gradients, p), save.down[m], dy, nil)
		s.blocks.loraOuter(s, s.a(s.lora.gradients, p), du, x, &p)
	}
	if !wantInput {
		return ggml.Tensor{}
	}
	wt := s.layers[layer].linears[m].wt
	dx := s.blocks.matmul(s, wt, s.blocks.input(s, wt, dy), residual)
	if trained {
		dx = s.blocks.loraUp(s, dx, du, s.a(s.lora.parameters, p), &p)
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

// heads is one of the rotated projections: q or k.
func (s *step) heads(layer int, m Module, x ggml.Tensor, in input, count int, save *saved) ggml.Tensor {
	y := s.linear(layer, m, x, in, ggml.Tensor{}, save)
	if gamma := s.layers[layer].headNorm[m]; gamma.Valid() {
		save.unnormed[m] = y
		y = s.blocks.rmsNorm(s, s.ctx.View(y, 0, s.Heads.Size, count*s.tokens), gamma)
	}
	return s.rotate(y, count, false)
}

// headsBack is the gradient of heads' projection, before rotation and norm.
func (s *step) headsBack(layer int, m Module, dy ggml.Tensor, count int, save saved) ggml.Tensor {
	dy = s.rotate(dy, count, true)
	if gamma := s.layers[layer].headNorm[m]; gamma.Valid() {
		d, n := s.Heads.Size, count*s.tokens
		dy = s.blocks.rmsNormBack(s, s.ctx.View(save.unnormed[m], 0, d, n), gamma, s.ctx.View(dy, 0, d, n), ggml.Tensor{})
		dy = s.ctx.View(dy, 0, d*count, s.tokens)
	}
	return dy
}

// forward is one block: x + o(attention(norm(x))), then + down(swiglu(norm(.))).
func (s *step) forward(i int, x ggml.Tensor, save *saved) ggml.Tensor {
	save.x = x
	s.inner(i, save)
	w := s.layers[i].linears[Down].w
	if !s.lora.trains(i, Down) {
		return s.linear(i, Down, ggml.Tensor{}, s.blocks.swigluInput(s, w, save.gate, save.up), save.middle, save)
	}
	hidden := s.blocks.swiglu(s, save.gate, save.up)
	return s.linear(i, Down, hidden, s.blocks.input(s, w, hidden), save.middle, save)
}

// normed is the norm of x as a layer's modules take it: as LoRA does, if one of them is trained, and as matmul does.
func (s *step) normed(layer int, x, gamma ggml.Tensor, modules ...Module) (ggml.Tensor, input) {
	w := s.layers[layer].linears[modules[0]].w
	if !s.lora.trains(layer, modules...) {
		return ggml.Tensor{}, s.blocks.normInput(s, w, x, gamma)
	}
	normed := s.blocks.rmsNorm(s, x, gamma)
	return normed, s.blocks.input(s, w, normed)
}

// pruned says whether a layer's output is computed for some positions only.
func (s *step) pruned(layer int) bool { return s.prune && layer == len(s.layers)-1 }

// inner is the block up to gate and up: all that backward wants to find again follows from save.x.
func (s *step) inner(i int, save *saved) {
	l := &s.layers[i]
	normed, in := s.normed(i, save.x, l.attentionNorm, Query, Key, Value)
	save.q = s.heads(i, Query, normed, in, s.Heads.Query, save)
	save.k = s.heads(i, Key, normed, in, s.Heads.KeyValue, save)
	save.v = s.linear(i, Value, normed, in, ggml.Tensor{}, save)
	save.attended, save.keep = s.blocks.attention(s, save.q, save.k, save.v)
	x := save.x
	if s.pruned(i) {
		x, save.attended = s.blocks.pick(s, x, s.taken), s.blocks.pick(s, save.attended, s.taken)
	}
	save.middle = s.linear(i, Output, save.attended, s.blocks.input(s, l.linears[Output].w, save.attended), x, save)
	normed, in = s.normed(i, save.middle, l.feedForwardNorm, Gate, Up)
	save.gate = s.linear(i, Gate, normed, in, ggml.Tensor{}, save)
	save.up = s.linear(i, Up, normed, in, ggml.Tensor{}, save)
}

// backward takes the gradient of a block's output and returns that of its input; the lowest trained layer has none to
// give. Norms and SwiGLU are computed again, which is cheaper than keeping their output; with Recompute, all but the
// block's input is: its tensors of the forward pass then have no use, and the allocator gives their memory away.
func (s *step) backward(i int, dy ggml.Tensor, save saved) ggml.Tensor {
	l := &s.layers[i]
	if s.Recompute {
		save = saved{x: save.x}
		s.inner(i, &save)
	}
	var hidden, normed ggml.Tensor
	if p, ok := s.lora.part(i, Down); ok {
		hidden = s.blocks.swiglu(s, save.gate, save.up)
		if s.Recompute {
			save.down[Down] = s.blocks.loraDown(s, hidden, s.a(s.lora.parameters, p), &p)
		}
	}
	dhidden := s.linearBack(i, Down, hidden, dy, ggml.Tensor{}, save, true)
	var dnormed ggml.Tensor
	if s.lora.trains(i, Gate, Up) {
		dgate, dup := s.blocks.swigluBack(s, save.gate, save.up, dhidden)
		normed = s.blocks.rmsNorm(s, save.middle, l.feedForwardNorm)
		dnormed = s.linearBack(i, Gate, normed, dgate, ggml.Tensor{}, save, true)
		dnormed = s.linearBack(i, Up, normed, dup, dnormed, save, true)
	} else {
		gate, up := l.linears[Gate].wt, l.linears[Up].wt
		dgate, dup := s.blocks.swigluBackInputs(s, gate, save.gate, save.up, dhidden)
		dnormed = s.blocks.matmul(s, gate, dgate, ggml.Tensor{})
		dnormed = s.blocks.matmul(s, up, dup, dnormed)
	}
	dmiddle := s.blocks.rmsNormBack(s, save.middle, l.feedForwardNorm, dnormed, dy)

	dattended := s.linearBack(i, Output, save.attended, dmiddle, ggml.Tensor{}, save, true)
	below := i > s.lora.lowest()
	if s.pruned(i) {
		dattended = s.blocks.scatter(s, ggml.Tensor{}, dattended, s.taken, s.tokens)
		if below {
			dmiddle = s.blocks.scatter(s, ggml.Tensor{}, dmiddle, s.taken, s.tokens)
		}
	}
	dq, dk, dv := s.blocks.attentionBack(s, save.q, save.k, save.v, save.keep, dattended)
	dq = s.headsBack(i, Query, dq, s.Heads.Query, save)
	dk = s.headsBack(i, Key, dk, s.Heads.KeyValue, save)
	if s.lora.trains(i, Query, Key, Value) {
		normed = s.blocks.rmsNorm(s, save.x, l.attentionNorm)
	}
	dnormed = s.linearBack(i, Query, normed, dq, ggml.Tensor{}, save, below)
	dnormed = s.linearBack(i, Key, normed, dk, dnormed, save, below)
	dnormed = s.linearBack(i, Value, normed, dv, dnormed, save, below)
	if !below {
		return ggml.Tensor{}
	}
	return s.blocks.rmsNormBack(s, save.x, l.attentionNorm, dnormed, dmiddle)
}

// logits are those of a chunk's positions; picked and normed are on the way to them. head is held.
func (s *step) logits(x ggml.Tensor, c chunk, head weight) (picked, out ggml.Tensor) {
	picked = s.blocks.pick(s, x, s.ctx.View(s.targets.index, c.fromPosition, c.positions))
	return picked, s.blocks.matmul(s, head, s.blocks.normInput(s, head, picked, s.norm), ggml.Tensor{})
}

// losses computes the losses of all targets; logits only where they are needed.
func (s *step) losses(x ggml.Tensor) {
	head := s.blocks.hold(s, s.head.w)
	for _, c := range s.targets.chunks {
		_, out := s.logits(x, c, head)
		if s.targets.logits.Valid() {
			s.add(s.ctx.Copy(out, s.ctx.View(s.targets.logits, c.fromPosition*s.Vocabulary, s.Vocabulary, c.positions)))
		}
		s.blocks.loss(s, out, c, false)
	}
}

// headGradient computes the losses of all targets and returns the gradient with respect to x.
func (s *step) headGradient(x ggml.Tensor) ggml.Tensor {
	head, back := s.blocks.hold(s, s.head.w), weight{}
	var dx ggml.Tensor
	for i, c := range s.targets.chunks {
		picked, out := s.logits(x, c, head)
		dlogits := s.blocks.loss(s, out, c, true)
		if i == 0 { // behind the logits: a single chunk has no use for both at the same time
			back = s.blocks.hold(s, s.head.wt)
		}
		dnormed := s.blocks.matmul(s, back, s.blocks.input(s, back, dlogits), ggml.Tensor{})
		dpicked := s.blocks.rmsNormBack(s, picked, s.norm, dnormed, ggml.Tensor{})
		dx = s.blocks.scatter(s, dx, dpicked, s.ctx.View(s.targets.index, c.fromPosition, c.positions), x.Size(1))
	}
	return dx
}
