package graph

import (
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// fused are the blocks of the CPU: custom operations that compute what plain.go composes from ggml's own.
type fused struct{}

// limits lets the head take 64 MiB of logits at once, or 128 positions: twice as many read its weights half as often,
// which is 4% of a forward pass with logits everywhere.
func (fused) limits(vocabulary int) limits {
	return limits{nodesPerLayer: 200, headTokens: min(256, max(128, 1<<24/vocabulary/64*64)), prune: true}
}

func (f fused) begin(*step, engine.Batch, *ggml.Context) (blocks, func(), error) {
	return f, func() {}, nil
}

func (fused) weigh(s *step, _ engine.Batch, weights []float32) { s.targets.weights.SetFloats(weights) }

func (fused) memory() int { return 0 }

func (fused) close() {}

// rounds says whether a product with w takes its input in block floating point.
func rounds(w weight) bool { return w.kind == Packed || w.kind == Stored }

func (fused) input(s *step, w weight, x ggml.Tensor) input {
	in := input{x, x.Size(1)}
	if rounds(w) {
		in.t = s.add(s.ctx.Quantize(x))
	}
	return in
}

func (f fused) normInput(s *step, w weight, x, gamma ggml.Tensor) input {
	if !rounds(w) {
		return f.input(s, w, f.rmsNorm(s, x, gamma))
	}
	return input{s.add(s.ctx.NormQuantize(x, gamma, s.Epsilon)), x.Size(1)}
}

func (f fused) swigluInput(s *step, w weight, gate, up ggml.Tensor) input {
	if !rounds(w) {
		return f.input(s, w, f.swiglu(s, gate, up))
	}
	return input{s.add(s.ctx.SwiGLUQuantize(gate, up)), gate.Size(1)}
}

func (f fused) swigluBackInputs(s *step, w weight, gate, up, dy ggml.Tensor) (dgate, dup input) {
	if !rounds(w) {
		g, u := f.swigluBack(s, gate, up, dy)
		return f.input(s, w, g), f.input(s, w, u)
	}
	g, u, node := s.ctx.SwiGLUBackQuantize(gate, up, dy)
	s.add(node)
	return input{g, gate.Size(1)}, input{u, gate.Size(1)}
}

func (fused) hold(s *step, w weight) weight {
	if w.kind == Stored {
		w.kind, w.t = Packed, s.add(s.ctx.Pack(w.t, w.transpose))
	}
	return w
}

func (fused) matmul(s *step, w weight, x input, residual ggml.Tensor) ggml.Tensor {
	if w = (fused{}).hold(s, w); w.kind == Packed {
		return s.add(s.ctx.PackedMatMul(w.t, x.t, residual, w.in, w.out, x.tokens))
	}
	y := s.add(s.ctx.MulMat(w.t, x.t))
	if residual.Valid() {
		y = s.add(s.ctx.Add(y, residual))
	}
	return y
}

func (fused) rmsNorm(s *step, x, gamma ggml.Tensor) ggml.Tensor {
	return s.add(s.ctx.RMSNorm(x, gamma, s.Epsilon))
}

func (fused) rmsNormBack(s *step, x, gamma, dy, residual ggml.Tensor) ggml.Tensor {
	return s.add(s.ctx.RMSNormBack(x, gamma, dy, residual, s.Epsilon))
}

func (fused) swiglu(s *step, gate, up ggml.Tensor) ggml.Tensor {
	return s.add(s.ctx.SwiGLU(gate, up))
}

func (fused) swigluBack(s *step, gate, up, dy ggml.Tensor) (dgate, dup ggml.Tensor) {
	dgate, dup, node := s.ctx.SwiGLUBack(gate, up, dy)
	s.add(node)
	return dgate, dup
}

// attention keeps nothing: the probabilities are computed again, 32 queries at a time.
func (fused) attention(s *step, q, k, v ggml.Tensor) (out, keep ggml.Tensor) {
	return s.add(s.ctx.Attention(q, k, v, s.segments, s.Heads)), ggml.Tensor{}
}

func (fused) attentionBack(s *step, q, k, v, _, dout ggml.Tensor) (dq, dk, dv ggml.Tensor) {
	dq, dk, dv, node := s.ctx.AttentionBack(q, k, v, s.segments, dout, s.Heads)
	s.add(node)
	return dq, dk, dv
}

func (fused) loraDown(s *step, x, w ggml.Tensor, drop *Part) ggml.Tensor {
	return s.add(s.ctx.LoRADown(x, w, s.dropout(drop)))
}

func (fused) loraUp(s *step, y, u, w ggml.Tensor, drop *Part) ggml.Tensor {
	return s.add(s.ctx.LoRAUp(y, u, w, float32(s.lora.Scale()), s.dropout(drop)))
}

func (fused) loraOuter(s *step, gradient, u, x ggml.Tensor, drop *Part) {
	s.add(s.ctx.LoRAOuter(gradient, u, x, float32(s.lora.Scale()), s.dropout(drop)))
}

// dropout is that of a part's module; a hash of the token's seed, the module and the element decides.
func (s *step) dropout(p *Part) ggml.Dropout {
	if p == nil {
		return ggml.Dropout{}
	}
	seeds := s.seeds
	if p.Module >= Output && s.pruned(p.Layer) {
		seeds = s.left
	}
	return ggml.Dropout{Seeds: seeds, Module: p.Layer*int(modules) + int(p.Module), P: s.lora.Dropout}
}

func (fused) pick(s *step, x, index ggml.Tensor) ggml.Tensor {
	return s.add(s.ctx.GetRows(x, index))
}

func (fused) scatter(s *step, dx, v, index ggml.Tensor, columns int) ggml.Tensor {
	return s.add(s.ctx.ScatterRows(dx, v, index, columns))
}

func (fused) loss(s *step, logits ggml.Tensor, c chunk, backward bool) ggml.Tensor {
	t := s.targets
	part := func(all ggml.Tensor) ggml.Tensor { return s.ctx.View(all, c.from, c.targets) }
	stats := s.ctx.View(t.stats, 2*c.from, 2, c.targets)
	if !backward {
		return s.add(s.ctx.Losses(logits, part(t.columns), part(t.labels), stats, c.fromPosition))
	}
	return s.add(s.ctx.CrossEntropy(logits, part(t.columns), part(t.labels), part(t.weights), stats, c.fromPosition, s.scale))
}
