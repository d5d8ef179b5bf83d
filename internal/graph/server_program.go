package graph

import (
	"cmp"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// A batch of T tokens is up to three programs, of which those of common sizes are kept:
//
//	body  all layers, of the last one only up to attention
//	tail  the rest of the last layer and the final norm, for the tokens whose output is wanted
//	head  their logits
//
// A layer is eight operations: norm and rounding, the products q, k and v in one, rotation and storing of keys and values,
// attention, rounding, the output product, norm and rounding, gate and up in one, SwiGLU and rounding, the down product.
// Where adapters change a product, its input is computed in float32, too, and what they add follows it.
//
// Every result has a place of its own that all programs share (slots), large enough for the largest batch.
type slotName int

const (
	slotX           slotName = iota // [D, T]: the stream between layers
	slotMiddle                      // [D, T]: between the halves of a layer
	slotNormed                      // [D, T]
	slotRounded                     // a product's input, rounded
	slotProduct                     // [out, T] of q, k and v, or of gate and up
	slotProduct2                    // those that are not stacked
	slotProduct3                    //
	slotAttended                    // [q, T]
	slotHidden                      // [F, T]
	slotPicked                      // [D, N]: of slotX
	slotPickedHeads                 // [q, N]: of slotAttended
	slotStates                      // [D, N]: after the final norm
	slotLogits                      // [V, N]
	slotCount
)

type slot struct {
	bytes  int
	memory mapping
}

type serverInputs struct {
	cells   ggml.Tensor    // of each row, int32
	rope    ggml.Tensor    // [dimensions, rows]
	tables  ggml.Tensor    // pages of each sequence, int32
	plan    ggml.Tensor    // of attention
	index   ggml.Tensor    // rows that the tail takes, int32
	adapted [3]ggml.Tensor // of body, tail and head
}

type stage uint8

const (
	stageBody stage = iota
	stageTail
	stageHead
)

type programKey struct {
	stage stage
	rows  int
	sites sites
	all   bool // of the tail: takes every row, in order
}

type serverProgram struct {
	context *ggml.Context
	program ggml.Program
}

type serverBatch struct {
	tokens         int
	logits, states int // rows of them
	inOrder        bool
	sites          sites
	outputs        []serverOutput // by part
	positions      []int32
	units          []ggml.Unit
}

type serverOutput struct {
	row, n int
	state  bool
}

func (s *Server) describeInputs() {
	b, o := s.shape, s.options
	s.inputs = ggml.NewContext(16, 0)
	s.in = serverInputs{
		cells: s.inputs.New(ggml.I32, o.BatchTokens), rope: s.inputs.New(ggml.F32, b.RopeDimensions, o.BatchTokens),
		tables: s.inputs.New(ggml.I32, s.cache.total(), o.Sequences), plan: s.inputs.New(ggml.I32, ggml.PlanInts(o.BatchTokens*b.Heads.Query)),
		index: s.inputs.New(ggml.I32, o.BatchTokens),
	}
	for i := range s.in.adapted {
		s.in.adapted[i] = s.inputs.New(ggml.I8, ggml.AdaptBytes(o.BatchTokens))
	}
	s.caches = ggml.NewContext(len(s.layers), 0)
	for i := range s.layers {
		s.layers[i].cache = s.caches.New(ggml.I8, s.cache.total()*s.paged.PageBytes())
	}
}

// measure finds the sizes of the slots: those of the largest programs.
func (s *Server) measure() {
	for _, key := range []programKey{
		{stageBody, s.options.BatchTokens, siteQKV | siteOutput | siteGateUp | siteDown, false}, {stageBody, s.options.BatchTokens, 0, false},
		{stageTail, s.options.BatchTokens, siteQKV | siteOutput | siteGateUp | siteDown, false}, {stageTail, s.options.BatchTokens, 0, false},
		{stageHead, s.options.BatchTokens, 0, false},
	} {
		b := s.newBuilder(key)
		b.measuring = true
		b.build(key)
		b.p.context.Free()
	}
}

// kept is up to how many rows a program is kept for good; of larger ones, the last few.
const kept, keptLarge = 64, 8

// prepared is the program for the key.
func (s *Server) prepared(key programKey) *ggml.Program {
	if p := s.programs[key]; p != nil {
		return &p.program
	}
	if key.rows > kept {
		if len(s.recent) == keptLarge {
			s.programs[s.recent[0]].context.Free()
			delete(s.programs, s.recent[0])
			s.recent = slices.Delete(s.recent, 0, 1)
		}
		s.recent = append(s.recent, key)
	}
	b := s.newBuilder(key)
	b.build(key)
	s.programs[key] = b.p
	return &b.p.program
}

// builder makes a program.
type builder struct {
	*Server
	p         *serverProgram
	x         *ggml.Context
	rows      int
	sites     sites
	adapted   ggml.Tensor
	measuring bool
}

func (s *Server) newBuilder(key programKey) *builder {
	p := &serverProgram{context: ggml.NewContext(32*s.shape.Layers+16, 0)}
	return &builder{Server: s, p: p, x: p.context, rows: key.rows, sites: key.sites, adapted: s.in.adapted[key.stage]}
}

// place gives a tensor the memory of its slot.
func (b *builder) place(t ggml.Tensor, name slotName) ggml.Tensor {
	if s := &b.slots[name]; b.measuring {
		s.bytes = max(s.bytes, t.MemoryBytes())
	} else {
		t.SetMemory(s.memory)
	}
	return t
}

// add appends an operation of about so many multiplications for each row, in tasks of a few microseconds.
func (b *builder) add(t ggml.Tensor, kind string, perRow int, name slotName) ggml.Tensor {
	return b.p.program.Add(b.place(t, name), kind, b.tasks(perRow*b.rows/(1<<15)))
}

func (b *builder) tasks(n int) int { return min(max(n, 1), 8*b.options.Threads) }

func (b *builder) build(key programKey) {
	d, q := b.shape.Embedding, b.shape.Heads.Query*b.shape.Heads.Size
	switch key.stage {
	case stageBody:
		x := b.place(b.x.New(ggml.F32, d, b.rows), slotX)
		for i := range b.layers {
			attended := b.attention(i, x)
			if i < len(b.layers)-1 {
				x = b.rest(i, x, attended, slotX)
			}
		}
	case stageTail:
		all := b.rows
		if !key.all {
			all = b.options.BatchTokens // only read at the index
		}
		x, attended, name := b.place(b.x.New(ggml.F32, d, all), slotX), b.place(b.x.New(ggml.F32, q, all), slotAttended), slotX
		if !key.all {
			index := b.x.New(ggml.I32, b.rows)
			if !b.measuring {
				index.ShareMemory(b.in.index)
			}
			name = slotPicked
			x = b.add(b.x.PickRows(x, index), "pick", d, slotPicked)
			attended = b.add(b.x.PickRows(attended, index), "pick", q, slotPickedHeads)
		}
		x = b.rest(len(b.layers)-1, x, attended, name)
		b.add(b.x.RMSNorm(x, b.norm, b.shape.Epsilon), "norm", 4*d, slotStates)
	case stageHead:
		states := b.place(b.x.New(ggml.F32, d, b.rows), slotStates)
		logits := b.product(b.head, b.round(states, b.head), ggml.Tensor{}, "product head", slotLogits)
		if b.sites&siteHead != 0 {
			b.adapt(logits, states, b.shape.Layers*int(modules), 1)
		}
	}
}

// normed is RMSNorm of x as a product with m takes it; the floats only where an adapter wants them.
func (b *builder) normed(x, gamma ggml.Tensor, m servedMatrix, site sites) (rounded, floats ggml.Tensor) {
	d := b.shape.Embedding
	switch {
	case b.sites&site != 0:
		floats = b.add(b.x.RMSNorm(x, gamma, b.shape.Epsilon), "norm", 4*d, slotNormed)
		return b.round(floats, m), floats
	case m.form.packed:
		return b.add(b.x.NormQuantize(x, gamma, b.shape.Epsilon), "norm round", 8*d, slotRounded), floats
	default:
		return b.add(b.x.NormQuantizeBytes(x, gamma, b.shape.Epsilon), "norm round", 8*d, slotRounded), floats
	}
}

// round is x as a product with m takes it.
func (b *builder) round(x ggml.Tensor, m servedMatrix) ggml.Tensor {
	if m.form.packed {
		return b.add(b.x.Quantize(x), "round", 4*m.in, slotRounded)
	}
	return b.add(b.x.QuantizeBytes(x), "round", 4*m.in, slotRounded)
}

// product is W x, plus residual if that is valid.
func (b *builder) product(m servedMatrix, x, residual ggml.Tensor, kind string, name slotName) ggml.Tensor {
	var y ggml.Tensor
	if m.form.packed {
		y = b.x.PackedMatMul(m.t, x, residual, m.in, m.out, b.rows)
	} else {
		y = b.x.RepackedMatMul(m.t, x, residual, m.form.repacked, m.in, m.out, b.rows)
	}
	// A row alone takes as long as its weights need from memory, which is what sixteen take to multiply.
	return b.p.program.Add(b.place(y, name), kind, b.tasks(m.in*m.out*(1+b.rows/16)/(1<<16)))
}

// products are those with the same input, stacked or not. Their inputs are rounded once for each form, which is the same for
// all but mixed files.
func (b *builder) products(list []servedMatrix, x ggml.Tensor, round func(m servedMatrix) ggml.Tensor, kind string) []ggml.Tensor {
	out := make([]ggml.Tensor, len(list))
	for i, m := range list {
		if i > 0 && m.form.packed != list[i-1].form.packed {
			x = round(m)
		}
		out[i] = b.product(m, x, ggml.Tensor{}, kind, slotProduct+slotName(i))
	}
	return out
}

// adapt adds what the rows' adapters make of x: pairs [first, first+n), whose outputs lie one behind the other in y.
func (b *builder) adapt(y, x ggml.Tensor, first, n int) {
	b.p.program.AddCounted(b.x.Adapt(y, x, b.adapted, first, n), "adapt")
}

// attention is the first half of a layer up to attention's result.
func (b *builder) attention(i int, x ggml.Tensor) ggml.Tensor {
	l, h := &b.layers[i], b.shape.Heads
	rounded, floats := b.normed(x, l.attentionNorm, l.qkv[0], siteQKV)
	y := b.products(l.qkv, rounded, func(m servedMatrix) ggml.Tensor {
		if floats.Valid() {
			return b.round(floats, m)
		}
		r, _ := b.normed(x, l.attentionNorm, m, 0)
		return r
	}, "product qkv")
	if b.sites&siteQKV != 0 {
		first := i*int(modules) + int(Query)
		for j := range y {
			b.adapt(y[j], floats, first+j, 3/len(y))
		}
	}
	p := ggml.Projections{Q: y[0], K: y[len(y)/2], V: y[len(y)-1], Bias: l.bias, Gamma: l.gamma, Epsilon: b.shape.Epsilon}
	q := b.x.PagedStore(p, b.in.rope, b.in.cells, l.cache, b.paged, b.shape.architecture.neoX)
	b.p.program.Add(q, "store", b.tasks(16*(h.Query+2*h.KeyValue)*h.Size*b.rows/(1<<15)))
	return b.p.program.AddCounted(b.place(b.x.PagedAttention(q, l.cache, b.in.tables, b.in.plan, b.paged), slotAttended), "attention")
}

// rest is a layer from attention's result on.
func (b *builder) rest(i int, x, attended ggml.Tensor, name slotName) ggml.Tensor {
	l, first := &b.layers[i], i*int(modules)
	middle := b.product(l.output, b.round(attended, l.output), x, "product o", slotMiddle)
	if b.sites&siteOutput != 0 {
		b.adapt(middle, attended, first+int(Output), 1)
	}
	rounded, floats := b.normed(middle, l.feedForwardNorm, l.gateUp[0], siteGateUp)
	y := b.products(l.gateUp, rounded, func(m servedMatrix) ggml.Tensor {
		if floats.Valid() {
			return b.round(floats, m)
		}
		r, _ := b.normed(middle, l.feedForwardNorm, m, 0)
		return r
	}, "product gate up")
	if b.sites&siteGateUp != 0 {
		for j := range y {
			b.adapt(y[j], floats, first+int(Gate)+j, 2/len(y))
		}
	}
	f := b.shape.FeedForward
	var hidden ggml.Tensor
	switch {
	case len(y) == 2 || b.sites&siteDown != 0:
		hidden = b.add(b.x.SwiGLURows(y[0], y[len(y)-1], f), "swiglu", 16*f, slotHidden)
		rounded = b.round(hidden, l.down)
	case l.down.form.packed:
		rounded = b.add(b.x.SwiGLUQuantize(y[0], ggml.Tensor{}), "swiglu round", 20*f, slotRounded)
	default:
		rounded = b.add(b.x.SwiGLUQuantizeBytes(y[0]), "swiglu round", 20*f, slotRounded)
	}
	out := b.product(l.down, rounded, middle, "product down", name)
	if b.sites&siteDown != 0 {
		b.adapt(out, hidden, first+int(Down), 1)
	}
	return out
}

// ---- a batch -----------------------------------------------------------------------------------------------------

// plan writes the inputs of a batch whose tokens have cells.
func (s *Server) plan(parts []engine.Part, all sites) {
	b, d := &s.batch, s.shape.Embedding
	if b.logits > kept { // do not hold on to what is seldom needed
		s.slots[slotLogits].memory.untouch(4 * kept * s.shape.Vocabulary)
	}
	*b = serverBatch{sites: all, inOrder: true, outputs: b.outputs[:0], positions: b.positions[:0], units: b.units[:0]}
	data := s.file.Data(s.embedding)
	rowBytes := len(data) / s.shape.Vocabulary
	cells, index := s.in.cells.Ints(), s.in.index.Ints()
	for _, p := range parts {
		o := serverOutput{row: b.logits, state: p.Want == engine.WantState}
		switch p.Want {
		case engine.WantLast:
			o.n = 1
		case engine.WantAll, engine.WantState:
			o.n = len(p.Tokens)
		}
		if o.state {
			b.states += o.n
		} else {
			b.logits += o.n
		}
		b.outputs = append(b.outputs, o)
	}
	row, state := 0, b.logits
	for i, p := range parts {
		o := &b.outputs[i]
		if o.state {
			o.row = state
			state += o.n
		}
		for j := range o.n {
			index[o.row+j] = int32(row + len(p.Tokens) - o.n + j)
			b.inOrder = b.inOrder && int(index[o.row+j]) == o.row+j
		}
		for j, token := range p.Tokens {
			position := p.Position + j
			b.positions = append(b.positions, int32(position))
			cells[row+j] = s.cache.cell(p.Sequence, position)
			ggml.Dequantize(rowOf(s.slots[slotX], row+j, d), ggml.Type(s.embedding.Type), data[int(token)*rowBytes:(int(token)+1)*rowBytes])
		}
		row += len(p.Tokens)
	}
	b.tokens = row
	rope := ggml.Rope{Dimensions: s.shape.RopeDimensions, Base: s.shape.RopeBase, Scale: s.shape.RopeScale, Factors: s.ropeFactors}
	rope.Table(s.in.rope.Floats(), b.positions)
	s.planAttention(parts)
	if all != 0 {
		s.planAdapters(parts)
	}
}

// planAttention cuts the queries into units: so few that the scores of one fit into the second-level cache, and of heads that
// share keys as long as there are enough for the threads.
func (s *Server) planAttention(parts []engine.Part) {
	b, h := &s.batch, s.shape.Heads
	group := h.Query / h.KeyValue
	const most, scores = 16, 1 << 17
	units := 0
	for _, p := range parts {
		units += (len(p.Tokens) + most - 1) / most * h.KeyValue
	}
	heads := group
	if units < 4*s.options.Threads {
		heads = 1
	}
	row := 0
	for _, p := range parts {
		end := p.Position + len(p.Tokens)
		queries := min(max(scores/(end*heads), 1), most)
		for from := 0; from < len(p.Tokens); from += queries {
			for kv := range h.KeyValue {
				for head := 0; head < group; head += heads {
					b.units = append(b.units, ggml.Unit{
						Row: int32(row + from), Queries: int32(min(queries, len(p.Tokens)-from)), Position: int32(p.Position + from),
						Table: int32(p.Sequence), KeyValue: int32(kv), Head: int32(head), HeadsOfGroup: int32(heads),
					})
				}
			}
		}
		row += len(p.Tokens)
	}
	// The long ones first, so that the threads end together.
	cost := func(u ggml.Unit) int64 { return int64(u.Queries) * int64(u.HeadsOfGroup) * int64(u.Position+u.Queries) }
	slices.SortStableFunc(b.units, func(x, y ggml.Unit) int { return cmp.Compare(cost(y), cost(x)) })
	s.in.plan.SetPlan(b.units)
}

// planAdapters writes which rows have which adapter: of the body, of the tail, and of the head, which takes the tail's first rows.
func (s *Server) planAdapters(parts []engine.Part) {
	b := &s.batch
	var body, tail []ggml.AdaptedRows
	add := func(list []ggml.AdaptedRows, a engine.Adapter, from, n int) []ggml.AdaptedRows {
		const most = 16
		if adapter, ok := a.(*servedAdapter); ok {
			for ; n > 0; from, n = from+most, n-most {
				list = append(list, ggml.AdaptedRows{From: from, N: min(n, most), Pairs: adapter.pairs})
			}
		}
		return list
	}
	row := 0
	for _, p := range parts {
		body = add(body, p.Adapter, row, len(p.Tokens))
		row += len(p.Tokens)
	}
	for _, states := range []bool{false, true} {
		for i, p := range parts {
			if o := b.outputs[i]; o.state == states {
				tail = add(tail, p.Adapter, o.row, o.n)
			}
		}
	}
	head := tail
	for len(head) > 0 && head[len(head)-1].From >= b.logits {
		head = head[:len(head)-1]
	}
	for i, list := range [][]ggml.AdaptedRows{body, tail, head} {
		slices := 1
		if len(list) < 2*s.options.Threads {
			slices = s.options.Threads
		}
		s.in.adapted[i].SetAdapted(list, slices)
	}
}

// stages are the programs of the planned batch, in order.
func (s *Server) stages() []programKey {
	b := &s.batch
	list := append(s.keys[:0], programKey{stage: stageBody, rows: b.tokens, sites: b.sites &^ siteHead})
	if n := b.logits + b.states; n > 0 {
		list = append(list, programKey{stageTail, n, b.sites &^ siteHead, b.inOrder && n == b.tokens})
	}
	if b.logits > 0 {
		list = append(list, programKey{stage: stageHead, rows: b.logits, sites: b.sites & siteHead})
	}
	s.keys = list
	return list
}

func (s *Server) compute() error {
	for _, key := range s.stages() {
		program := s.prepared(key)
		if s.costs != nil {
			costs, err := s.crew.Profile(program)
			if err != nil {
				return err
			}
			for kind, c := range costs {
				sum := s.costs[kind]
				s.costs[kind] = ggml.Cost{Kind: kind, Nodes: sum.Nodes + c.Nodes, Time: sum.Time + c.Time}
			}
		} else if err := s.crew.Run(program); err != nil {
			return err
		}
	}
	return nil
}

// Profile does what Decode does and returns what its operations of each kind took.
func (s *Server) Profile(parts []engine.Part) (map[string]ggml.Cost, error) {
	s.costs = make(map[string]ggml.Cost)
	defer func() { s.costs = nil }()
	if err := s.Decode(parts); err != nil {
		return nil, err
	}
	return s.costs, nil
}
