package graph

import (
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// blocks are the building blocks of a step that kinds of devices compute differently: fused custom operations on the
// CPU (fused.go), ggml's own operations elsewhere (plain.go), which also run on the CPU as the reference of the fused
// ones. Tensors are float32, contiguous, [width, T] in ne order; T is the number of tokens.
type blocks interface {
	// limits bounds a step's graph.
	limits(vocabulary int) limits
	// begin returns the blocks of one step, which another goroutine may build while those of a step before are in use. It
	// describes the inputs that they need besides those of the step, at most extraInputs, and returns a function that
	// fills these once they have memory.
	begin(s *step, b engine.Batch, inputs *ggml.Context) (own blocks, fill func(), err error)
	// weigh sets the targets' weights: once before the computation, and again after Batch.Weigh.
	weigh(s *step, b engine.Batch, weights []float32)
	// memory is what the blocks hold on the device between steps, in bytes.
	memory() int
	close()

	// input is x as matmul takes it: computed once, used by every weight of the same layout that multiplies x.
	input(s *step, w weight, x ggml.Tensor) input
	// normInput is input of rmsNorm, swigluInput that of swiglu, and swigluBackInputs those of swigluBack, for products that
	// alone want them.
	normInput(s *step, w weight, x, gamma ggml.Tensor) input
	swigluInput(s *step, w weight, gate, up ggml.Tensor) input
	swigluBackInputs(s *step, w weight, gate, up, dy ggml.Tensor) (dgate, dup input)
	// hold is w in a form that several products may share.
	hold(s *step, w weight) weight
	// matmul is W x, plus residual if that is valid.
	matmul(s *step, w weight, x input, residual ggml.Tensor) ggml.Tensor

	rmsNorm(s *step, x, gamma ggml.Tensor) ggml.Tensor
	// rmsNormBack is the gradient with respect to x, plus residual if that is valid.
	rmsNormBack(s *step, x, gamma, dy, residual ggml.Tensor) ggml.Tensor
	swiglu(s *step, gate, up ggml.Tensor) ggml.Tensor
	swigluBack(s *step, gate, up, dy ggml.Tensor) (dgate, dup ggml.Tensor)

	// attention also returns what its gradient wants to find again, or an invalid tensor.
	attention(s *step, q, k, v ggml.Tensor) (out, keep ggml.Tensor)
	attentionBack(s *step, q, k, v, keep, dout ggml.Tensor) (dq, dk, dv ggml.Tensor)

	// loraDown is w dropout(x); loraUp returns y + scale dropout(w u), which may be computed in y's place; loraOuter adds
	// scale * sum over tokens of u (outer) dropout(x) to gradient, in place. A part's dropout is that of its module. plain scales in loraDown instead, once for both of its uses.
	loraDown(s *step, x, w ggml.Tensor, drop *Part) ggml.Tensor
	loraUp(s *step, y, u, w ggml.Tensor, drop *Part) ggml.Tensor
	loraOuter(s *step, gradient, u, x ggml.Tensor, drop *Part)

	// pick takes the columns of index [n] out of x; scatter adds their gradients to dx (invalid: to zeroes), which has
	// so many columns.
	pick(s *step, x, index ggml.Tensor) ggml.Tensor
	scatter(s *step, dx, v, index ggml.Tensor, columns int) ggml.Tensor
	// loss writes the losses of targets into their part of s.stats and returns the gradient of the logits [V, n],
	// which may take their place, or an invalid tensor without backward.
	loss(s *step, logits ggml.Tensor, c chunk, backward bool) ggml.Tensor
}

type limits struct {
	nodesPerLayer int  // operations and views of a layer, forward and backward
	headTokens    int  // positions that the head takes at once: its logits are headTokens x vocabulary float32 values
	prune         bool // the last layer may compute some positions only
}

const extraInputs = 16

// input is x [in, tokens] in the form that a layout's matmul takes it.
type input struct {
	t      ggml.Tensor
	tokens int
}

// chunk is the part of the targets that the head takes at once: distinct positions [FromPosition, FromPosition +
// Positions) and their targets [From, From+Targets).
type chunk struct {
	fromPosition, positions int
	from, targets           int
}
