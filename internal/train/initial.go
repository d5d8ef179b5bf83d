package train

import (
	"math"
	"math/rand/v2"

	"github.com/hone-llm/hone/internal/graph"
)

// initialise draws A as PEFT's LoraConfig.init_lora_weights says and leaves B at 0. Each matrix has its own random
// stream, so that its values do not depend on which others are trained.
//
//	true      uniformly from (-1/sqrt(in), 1/sqrt(in)): kaiming_uniform with a = sqrt(5)
//	gaussian  from a normal distribution with standard deviation 1/r
func initialise(l *graph.LoRA, how string, seed int64) {
	for _, p := range l.Parts {
		random := rand.New(rand.NewPCG(uint64(seed), uint64(p.Layer)<<8|uint64(p.Module)))
		bound := 1 / math.Sqrt(float64(p.In))
		a := l.Parameters[p.A : p.A+l.Rank*p.In]
		for i := range a {
			if how == "gaussian" {
				a[i] = float32(random.NormFloat64() / float64(l.Rank))
			} else {
				a[i] = float32((2*random.Float64() - 1) * bound)
			}
		}
	}
}

// dropoutSeed is the seed of one token's dropout masks. It depends on nothing but its arguments: a resumed job draws
// the same masks. example is the row's number in the file.
func dropoutSeed(seed int64, epoch, example, position int) uint32 {
	z := uint64(seed)*0x9E3779B97F4A7C15 + uint64(epoch)<<48 + uint64(example)<<20 + uint64(position)
	z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
	z = (z ^ z>>27) * 0x94D049BB133111EB
	return uint32(z ^ z>>31)
}
