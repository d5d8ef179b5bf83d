package train

import (
	"math"
	"runtime"
	"sync"

	"github.com/hone-llm/hone/internal/ggml"
)

// AdamW are the settings of the optimizer, as torch.optim.AdamW's (https://arxiv.org/abs/1711.05101).
type AdamW struct {
	Beta1, Beta2, Epsilon, WeightDecay float64
}

// moments are the running means of the gradient and of its square, one value a parameter.
type moments struct {
	first, second []float32
}

func newMoments(n int) moments { return moments{make([]float32, n), make([]float32, n)} }

// step updates parameters in place with gradients times gradientScale; number counts steps from 1.
//
//	p -= lr * (weight_decay * p + m / (1-beta1^number) / (sqrt(v / (1-beta2^number)) + epsilon))
func (o AdamW) step(parameters, gradients []float32, m moments, gradientScale, learningRate float64, number int) {
	decay := float32(1 - learningRate*o.WeightDecay)
	size := float32(learningRate / (1 - math.Pow(o.Beta1, float64(number))))
	root := float32(1 / math.Sqrt(1-math.Pow(o.Beta2, float64(number))))
	b1, b2, eps, scale := float32(o.Beta1), float32(o.Beta2), float32(o.Epsilon), float32(gradientScale)
	inParallel(len(parameters), func(from, to int) {
		ggml.AdamW(parameters[from:to], gradients[from:to], m.first[from:to], m.second[from:to], scale, decay, size, root, b1, b2, eps)
	})
}

// norm is the Euclidean norm of values. The sum runs in a fixed order, so that a resumed run repeats it exactly.
func norm(values []float32) float64 {
	const parts = 64
	var sums [parts]float64
	inParallel(parts, func(from, to int) {
		for part := from; part < to; part++ {
			sum := 0.0
			for _, v := range values[len(values)*part/parts : len(values)*(part+1)/parts] {
				sum += float64(v) * float64(v)
			}
			sums[part] = sum
		}
	})
	total := 0.0
	for _, sum := range sums {
		total += sum
	}
	return math.Sqrt(total)
}

// inParallel calls work on parts of [0, n), one for each processor.
func inParallel(n int, work func(from, to int)) {
	var wait sync.WaitGroup
	parts := min(n, runtime.GOMAXPROCS(0))
	for i := range parts {
		wait.Go(func() { work(n*i/parts, n*(i+1)/parts) })
	}
	wait.Wait()
}
