package reference

import (
	"fmt"

	"github.com/hone-llm/hone/internal/engine"
)

// Pass is a micro-batch between its forward and its backward pass. Losses, Correct and Logits have an entry for each
// target of the batch.
type Pass struct {
	Losses  []float64 // in nats
	Correct []bool
	Logits  Matrix // [targets, V]

	model     *Model
	lora      *LoRA
	batch     engine.Batch
	positions []int   // [T] in the row
	visible   [][]int // [T] the tokens that each looks at
	layers    []saved
	x, normed Matrix // [T, D] before and after the last norm
}

// saved is what the backward pass of a block needs from its forward pass.
type saved struct {
	x, normed            Matrix   // [T, D] the block's input, before and after its norm
	flatQuery, flatKey   Matrix   // before the norm of the heads and the rotation
	q, k, v              Matrix   // as attention takes them
	probabilities        []Matrix // of attention
	attended             Matrix
	middle, middleNormed Matrix // [T, D] the feed-forward half's input, before and after its norm
	gate, up, hidden     Matrix // [T, F]
}

// visible lists, for each token, those that it looks at: what the last token of its segment's parent looks at, the
// tokens before it in its own segment, and itself.
func visible(b engine.Batch) [][]int {
	all := make([][]int, len(b.Tokens))
	for _, s := range b.Segments {
		var sight []int
		if s.Parent >= 0 {
			sight = all[b.Segments[s.Parent].End-1]
		}
		for t := s.Start; t < s.End; t++ {
			sight = append(sight[:len(sight):len(sight)], t)
			all[t] = sight
		}
	}
	return all
}

// Forward computes the logits and losses of a batch's targets. A nil lora is the base model.
func (m *Model) Forward(b engine.Batch, lora *LoRA) (*Pass, error) {
	if err := b.Validate(m.Vocabulary); err != nil {
		return nil, err
	}
	p := &Pass{model: m, lora: lora, batch: b, positions: b.Positions(), visible: visible(b), layers: make([]saved, m.Layers)}
	for _, token := range b.Tokens {
		p.x = append(p.x, m.embedding[token])
	}
	for i := range m.layers {
		p.x = p.block(i, p.x)
	}
	p.normed = rmsNorm(p.x, m.norm, m.Epsilon)
	for _, target := range b.Targets {
		logits := product(m.head, p.normed[target.Position])
		loss, correct := crossEntropy(logits, int(target.Label))
		p.Logits, p.Losses, p.Correct = append(p.Logits, logits), append(p.Losses, loss), append(p.Correct, correct)
	}
	return p, nil
}

// block is x + o(attention(norm(x))), then x + down(swiglu(norm(x))): LlamaDecoderLayer of transformers. Qwen2 adds biases
// to q, k and v, Qwen3 a norm of each head of q and k.
func (p *Pass) block(i int, x Matrix) Matrix {
	m, l, s := p.model, &p.model.layers[i], &p.layers[i]
	s.x, s.normed = x, rmsNorm(x, l.attentionNorm, m.Epsilon)
	s.flatQuery, s.flatKey, s.v = p.linear(i, Query, s.normed), p.linear(i, Key, s.normed), p.linear(i, Value, s.normed)
	s.q, s.k = p.turn(s.flatQuery, l.queryNorm), p.turn(s.flatKey, l.keyNorm)
	s.attended, s.probabilities = m.attention(s.q, s.k, s.v, p.visible)
	s.middle = sum(x, p.linear(i, Output, s.attended))

	s.middleNormed = rmsNorm(s.middle, l.feedForwardNorm, m.Epsilon)
	s.gate, s.up = p.linear(i, Gate, s.middleNormed), p.linear(i, Up, s.middleNormed)
	s.hidden = swiglu(s.gate, s.up)
	return sum(s.middle, p.linear(i, Down, s.hidden))
}

// Backward adds the gradient of sum(weights * losses) to that of every pair of the adapter.
func (p *Pass) Backward(weights []float64) {
	m := p.model
	dnormed := NewMatrix(len(p.x), m.Embedding)
	for i, target := range p.batch.Targets {
		dlogits := crossEntropyBack(p.Logits[i], int(target.Label), weights[i])
		for e, d := range transposedProduct(m.head, dlogits) {
			dnormed[target.Position][e] += d
		}
	}
	dx := rmsNormBack(p.x, m.norm, m.Epsilon, dnormed)
	for i := m.Layers - 1; i >= 0; i-- {
		dx = p.blockBack(i, dx)
	}
}

// blockBack takes the gradient of a block's output and returns that of its input: block read backwards. What went two
// ways comes back as a sum.
func (p *Pass) blockBack(i int, dy Matrix) Matrix {
	m, l, s := p.model, &p.model.layers[i], &p.layers[i]
	dhidden := p.linearBack(i, Down, s.hidden, dy)
	dgate, dup := swigluBack(s.gate, s.up, dhidden)
	dnormed := sum(p.linearBack(i, Gate, s.middleNormed, dgate), p.linearBack(i, Up, s.middleNormed, dup))
	dmiddle := sum(dy, rmsNormBack(s.middle, l.feedForwardNorm, m.Epsilon, dnormed))

	dattended := p.linearBack(i, Output, s.attended, dmiddle)
	dq, dk, dv := m.attentionBack(s.q, s.k, s.v, p.visible, s.probabilities, dattended)
	dq, dk = p.turnBack(s.flatQuery, l.queryNorm, dq), p.turnBack(s.flatKey, l.keyNorm, dk)
	dnormed = sum(p.linearBack(i, Query, s.normed, dq), p.linearBack(i, Key, s.normed, dk), p.linearBack(i, Value, s.normed, dv))
	return sum(dmiddle, rmsNormBack(s.x, l.attentionNorm, m.Epsilon, dnormed))
}

// turn is what happens to q and k on their way into attention: the norm of each head, if the model has one, and the
// rotation.
func (p *Pass) turn(x Matrix, norm []float64) Matrix {
	if norm != nil {
		x = rmsNorm(x, norm, p.model.Epsilon)
	}
	return p.model.rotate(x, p.positions, 1)
}

func (p *Pass) turnBack(x Matrix, norm []float64, dy Matrix) Matrix {
	dx := p.model.rotate(dy, p.positions, -1)
	if norm != nil {
		dx = rmsNormBack(x, norm, p.model.Epsilon, dx)
	}
	return dx
}

// linear is W x + bias + Scale * B A (mask * x), peft.tuners.lora.Linear.
func (p *Pass) linear(layer int, module Module, x Matrix) Matrix {
	l := p.model.layers[layer].linears[module]
	pair, mask := p.adapter(layer, module)
	y := make(Matrix, len(x))
	for t := range x {
		y[t] = product(l.w, x[t])
		for o := range l.bias {
			y[t][o] += l.bias[o]
		}
		if pair != nil {
			pair.forward(y[t], mask(t, x[t]), p.lora.Scale)
		}
	}
	return y
}

// linearBack adds the gradients of A and B and returns that of x: W^T dy + Scale * mask * (A^T B^T dy).
func (p *Pass) linearBack(layer int, module Module, x, dy Matrix) Matrix {
	l := p.model.layers[layer].linears[module]
	pair, mask := p.adapter(layer, module)
	dx := make(Matrix, len(x))
	for t := range x {
		dx[t] = transposedProduct(l.w, dy[t])
		if pair != nil {
			for i, d := range mask(t, pair.backward(mask(t, x[t]), dy[t], p.lora.Scale)) {
				dx[t][i] += d
			}
		}
	}
	return dx
}

// adapter returns the pair of a layer's module, nil if it has none, and the dropout of its input: mask multiplies the
// elements of token t.
func (p *Pass) adapter(layer int, module Module) (pair *Pair, mask func(t int, x []float64) []float64) {
	if p.lora == nil {
		return nil, nil
	}
	site := Site{layer, module}
	mask = func(t int, x []float64) []float64 {
		if p.lora.Mask == nil || p.batch.Seeds == nil {
			return x
		}
		out := make([]float64, len(x))
		for i := range x {
			out[i] = x[i] * p.lora.Mask(site, p.batch.Seeds[t], i)
		}
		return out
	}
	return p.lora.Pairs[site], mask
}

// Gradients runs a micro-batch forward and backward and adds the gradient of scale * sum(weight * loss) to the adapter's.
func (m *Model) Gradients(b engine.Batch, lora *LoRA, scale float64) (engine.Result, error) {
	p, err := m.Forward(b, lora)
	if err != nil {
		return engine.Result{}, err
	}
	result := p.Result()
	weights := make([]float64, len(b.Targets))
	for i, target := range b.Targets {
		weights[i] = scale * float64(target.Weight)
	}
	if b.Weigh != nil {
		derivatives, err := b.Weigh(result.Losses)
		if err != nil {
			return engine.Result{}, err
		}
		if len(derivatives) != len(weights) {
			return engine.Result{}, fmt.Errorf("micro-batch: %d weights for %d targets", len(derivatives), len(weights))
		}
		for i, w := range derivatives {
			weights[i] = scale * float64(w)
		}
	}
	p.Backward(weights)
	return result, nil
}

// Result rounds the losses to what an engine reports.
func (p *Pass) Result() engine.Result {
	r := engine.Result{Losses: make([]float32, len(p.Losses)), Correct: p.Correct}
	for i, loss := range p.Losses {
		r.Losses[i] = float32(loss)
	}
	return r
}
