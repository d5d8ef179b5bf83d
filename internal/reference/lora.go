package reference

import "math"

// Site is one linear layer of the model.
type Site struct {
	Layer  int
	Module Module
}

// Sites are the given modules of layers 0 to layers-1.
func Sites(layers int, modules ...Module) []Site {
	var sites []Site
	for i := range layers {
		for _, m := range modules {
			sites = append(sites, Site{i, m})
		}
	}
	return sites
}

// LoRA is an adapter, https://arxiv.org/abs/2106.09685: at each of its sites, y = W x + Scale * B A (mask * x).
type LoRA struct {
	Scale float64
	Pairs map[Site]*Pair
	Mask  Mask // nil: no dropout
}

// Pair is the trained matrices of one site and the sums of their gradients, in PEFT's shapes.
type Pair struct {
	A, GradA Matrix // [rank, in]
	B, GradB Matrix // [out, rank]
}

// NewLoRA is an adapter of zeros.
func (m *Model) NewLoRA(rank int, scale float64, sites []Site) *LoRA {
	l := &LoRA{Scale: scale, Pairs: map[Site]*Pair{}}
	for _, site := range sites {
		in, out := m.moduleSize(site.Module)
		l.Pairs[site] = &Pair{NewMatrix(rank, in), NewMatrix(rank, in), NewMatrix(out, rank), NewMatrix(out, rank)}
	}
	return l
}

// Mask is what dropout multiplies an element of a site's input by: 0, or 1/(1-p). seed is the token's (engine.Batch.Seeds).
type Mask func(site Site, seed uint32, element int) float64

// Dropout is torch.nn.Dropout(p) with the masks of the engines: element i of a token is dropped where 16 bits of a
// hash of (seed, module, i) are below p, which is rounded to a multiple of 2^-16. Elements 16 apart in a block of 32
// share a hash, its low and its high half. The hash is lowbias32, https://github.com/skeeto/hash-prospector.
func Dropout(p float64) Mask {
	threshold := uint32(math.Round(p * (1 << 16)))
	keep := 1 / (1 - float64(threshold)/(1<<16))
	number := map[Module]uint32{}
	for i, m := range Modules {
		number[m] = uint32(i)
	}
	return func(site Site, seed uint32, element int) float64 {
		module := uint32(site.Layer*len(Modules)) + number[site.Module]
		x := uint32(element/32*16+element%16)*0x85ebca6b + (seed ^ module*0x9e3779b9)
		x = (x ^ x>>16) * 0x7feb352d
		x = (x ^ x>>15) * 0x846ca68b
		x ^= x >> 16
		if element&16 == 0 {
			x &= 0xffff
		} else {
			x >>= 16
		}
		if x < threshold {
			return 0
		}
		return keep
	}
}

// forward adds scale * B A x to y; x is one token's input after dropout.
func (p *Pair) forward(y, x []float64, scale float64) {
	for r, u := range product(p.A, x) {
		for o := range y {
			y[o] += scale * p.B[o][r] * u
		}
	}
}

// backward adds one token's share of the gradients and returns that of x:
//
//	dB = scale * dy (A x)^T     dA = scale * (B^T dy) x^T     dx = scale * A^T B^T dy
func (p *Pair) backward(x, dy []float64, scale float64) []float64 {
	u, du := product(p.A, x), transposedProduct(p.B, dy)
	dx := make([]float64, len(x))
	for r := range u {
		for o := range dy {
			p.GradB[o][r] += scale * dy[o] * u[r]
		}
		for i := range x {
			p.GradA[r][i] += scale * du[r] * x[i]
			dx[i] += scale * p.A[r][i] * du[r]
		}
	}
	return dx
}
