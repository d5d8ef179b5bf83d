package reference

import "math"

func dot(a, b []float64) float64 {
	sum := 0.0
	for i := range a {
		sum += a[i] * b[i]
	}
	return sum
}

// product is W x, torch.nn.functional.linear.
func product(w Matrix, x []float64) []float64 {
	y := make([]float64, len(w))
	for o := range w {
		y[o] = dot(w[o], x)
	}
	return y
}

// transposedProduct is W^T y, the gradient of product with respect to x.
func transposedProduct(w Matrix, y []float64) []float64 {
	x := make([]float64, len(w[0]))
	for o := range w {
		for i := range x {
			x[i] += w[o][i] * y[o]
		}
	}
	return x
}

// sum adds matrices of one shape.
func sum(terms ...Matrix) Matrix {
	out := NewMatrix(len(terms[0]), len(terms[0][0]))
	for _, m := range terms {
		for t := range out {
			for i := range out[t] {
				out[t][i] += m[t][i]
			}
		}
	}
	return out
}

// rmsNorm is y = x / sqrt(mean(x^2) + eps) * gamma, torch.nn.functional.rms_norm, https://arxiv.org/abs/1910.07467. The
// mean is over len(gamma) elements: a whole row, or one head after the other.
func rmsNorm(x Matrix, gamma []float64, eps float64) Matrix {
	out := NewMatrix(len(x), len(x[0]))
	n := len(gamma)
	for t := range x {
		for from := 0; from < len(x[t]); from += n {
			v, y := x[t][from:from+n], out[t][from:from+n]
			r := 1 / math.Sqrt(dot(v, v)/float64(n)+eps)
			for i := range v {
				y[i] = v[i] * r * gamma[i]
			}
		}
	}
	return out
}

// rmsNormBack is the gradient of rmsNorm with respect to x. With r = 1/sqrt(mean(x^2) + eps) and g = gamma * dy:
//
//	dx = r g - r^3 x mean(g x)
func rmsNormBack(x Matrix, gamma []float64, eps float64, dy Matrix) Matrix {
	out := NewMatrix(len(x), len(x[0]))
	n := len(gamma)
	for t := range x {
		for from := 0; from < len(x[t]); from += n {
			v, dx := x[t][from:from+n], out[t][from:from+n]
			g := make([]float64, n)
			for i := range g {
				g[i] = gamma[i] * dy[t][from+i]
			}
			r := 1 / math.Sqrt(dot(v, v)/float64(n)+eps)
			mean := dot(g, v) / float64(n)
			for i := range v {
				dx[i] = r*g[i] - r*r*r*v[i]*mean
			}
		}
	}
	return out
}

// rotate is the rotary embedding, https://arxiv.org/abs/2104.09864: in every head, pair i of n/2 is turned by the angle
//
//	direction * position * RopeScale * RopeBase^(-2i/n) / ropeFactors[i]
//
// Pairs are neighbours (2i, 2i+1) as in the paper, or halves (i, i+n/2) as in transformers' rotate_half. Elements behind
// n = RopeDimensions stay. A rotation's transpose is the rotation back: direction 1 is forward, -1 the gradient.
func (m *Model) rotate(x Matrix, positions []int, direction float64) Matrix {
	out := NewMatrix(len(x), len(x[0]))
	n := m.RopeDimensions
	for t := range x {
		copy(out[t], x[t])
		for i := range n / 2 {
			angle := direction * float64(positions[t]) * m.RopeScale * math.Pow(m.RopeBase, -2*float64(i)/float64(n))
			if m.ropeFactors != nil {
				angle /= m.ropeFactors[i]
			}
			sin, cos := math.Sincos(angle)
			a, b := 2*i, 2*i+1
			if m.RopeHalves {
				a, b = i, i+n/2
			}
			for head := 0; head < len(x[t]); head += m.HeadSize {
				u, v := x[t][head+a], x[t][head+b]
				out[t][head+a], out[t][head+b] = u*cos-v*sin, u*sin+v*cos
			}
		}
	}
	return out
}

// softmax is torch.softmax; it also returns log(sum(exp(x))).
func softmax(x []float64) (p []float64, logSum float64) {
	largest := math.Inf(-1)
	for _, v := range x {
		largest = max(largest, v)
	}
	p, total := make([]float64, len(x)), 0.0
	for i, v := range x {
		p[i] = math.Exp(v - largest)
		total += p[i]
	}
	for i := range p {
		p[i] /= total
	}
	return p, largest + math.Log(total)
}

// part is head h of a row.
func (m *Model) part(row []float64, h int) []float64 { return row[h*m.HeadSize : (h+1)*m.HeadSize] }

// keyHead is the key-value head of a query head: neighbours share one, https://arxiv.org/abs/2305.13245.
func (m *Model) keyHead(queryHead int) int { return queryHead / (m.QueryHeads / m.KeyHeads) }

// attention is torch.nn.functional.scaled_dot_product_attention with enable_gqa, https://arxiv.org/abs/1706.03762, where
// token t looks at the tokens visible[t]:
//
//	p = softmax(q k^T / sqrt(HeadSize))     out = p v
//
// The probabilities [T][QueryHeads][len(visible[t])] are what the gradient needs of it.
func (m *Model) attention(q, k, v Matrix, visible [][]int) (out Matrix, probabilities []Matrix) {
	out = NewMatrix(len(q), len(q[0]))
	probabilities = make([]Matrix, len(q))
	for t := range q {
		for h := range m.QueryHeads {
			kv := m.keyHead(h)
			scores := make([]float64, len(visible[t]))
			for i, s := range visible[t] {
				scores[i] = dot(m.part(q[t], h), m.part(k[s], kv)) / math.Sqrt(float64(m.HeadSize))
			}
			p, _ := softmax(scores)
			for i, s := range visible[t] {
				for e, value := range m.part(v[s], kv) {
					m.part(out[t], h)[e] += p[i] * value
				}
			}
			probabilities[t] = append(probabilities[t], p)
		}
	}
	return out, probabilities
}

// attentionBack is the gradient of attention:
//
//	dv = p^T dout     dp = dout v^T     dscores = p * (dp - sum(p * dp))     dq, dk = dscores k, dscores^T q / sqrt(HeadSize)
func (m *Model) attentionBack(q, k, v Matrix, visible [][]int, probabilities []Matrix, dout Matrix) (dq, dk, dv Matrix) {
	dq, dk, dv = NewMatrix(len(q), len(q[0])), NewMatrix(len(k), len(k[0])), NewMatrix(len(v), len(v[0]))
	for t := range q {
		for h := range m.QueryHeads {
			kv, p := m.keyHead(h), probabilities[t][h]
			dp := make([]float64, len(p))
			for i, s := range visible[t] {
				dp[i] = dot(m.part(dout[t], h), m.part(v[s], kv))
			}
			mean := dot(p, dp)
			for i, s := range visible[t] {
				dscore := p[i] * (dp[i] - mean) / math.Sqrt(float64(m.HeadSize))
				for e := range m.HeadSize {
					m.part(dv[s], kv)[e] += p[i] * m.part(dout[t], h)[e]
					m.part(dq[t], h)[e] += dscore * m.part(k[s], kv)[e]
					m.part(dk[s], kv)[e] += dscore * m.part(q[t], h)[e]
				}
			}
		}
	}
	return dq, dk, dv
}

func sigmoid(x float64) float64 { return 1 / (1 + math.Exp(-x)) }

// swiglu is silu(gate) * up with silu(x) = x sigmoid(x), https://arxiv.org/abs/2002.05202.
func swiglu(gate, up Matrix) Matrix {
	out := NewMatrix(len(gate), len(gate[0]))
	for t := range out {
		for i, g := range gate[t] {
			out[t][i] = g * sigmoid(g) * up[t][i]
		}
	}
	return out
}

// swigluBack is the gradient of swiglu; silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x))).
func swigluBack(gate, up, dy Matrix) (dgate, dup Matrix) {
	dgate, dup = NewMatrix(len(gate), len(gate[0])), NewMatrix(len(gate), len(gate[0]))
	for t := range dy {
		for i, g := range gate[t] {
			s := sigmoid(g)
			dgate[t][i] = dy[t][i] * up[t][i] * s * (1 + g*(1-s))
			dup[t][i] = dy[t][i] * g * s
		}
	}
	return dgate, dup
}

// crossEntropy is torch.nn.functional.cross_entropy for one row: -log softmax(logits)[label], in nats. It says whether
// the label has the largest logit.
func crossEntropy(logits []float64, label int) (loss float64, correct bool) {
	_, logSum := softmax(logits)
	correct = true
	for _, v := range logits {
		correct = correct && v <= logits[label]
	}
	return logSum - logits[label], correct
}

// crossEntropyBack is the gradient of weight * crossEntropy: weight * (softmax(logits) - onehot(label)).
func crossEntropyBack(logits []float64, label int, weight float64) []float64 {
	d, _ := softmax(logits)
	d[label]--
	for i := range d {
		d[i] *= weight
	}
	return d
}
