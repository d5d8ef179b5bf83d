package runner

import "time"

const (
	// maxSlowdown is how much longer the time between two tokens of a running stream may become while prompts are computed
	// beside it. The bound that hone promises is 3; the difference is for what the measurement does not see: readers of two kinds at
	// once, and prompt tokens that cost more the later they stand. With 2.3, a 3,900-token prompt came to 3.3 on an idle machine.
	maxSlowdown = 2.0
	// leastChunk is the fewest tokens of prompts in a batch, so that they end in any case.
	leastChunk = 2
	// refreshSteps is how often a batch has no prompt, to measure again what one costs: the machine's load changes.
	refreshSteps = 8
	// firstChunk is taken while nothing has been measured yet.
	firstChunk = 16
	// backgroundSteps: while others are computed, the background is in one of so many batches, so that it goes on in any case.
	backgroundSteps = 32
	// recently is how long after a request that was not of the background another one is expected. Until then batches of the
	// background alone have at most backgroundChunk tokens of prompts, because a request that comes waits for the one under way.
	recently        = 10 * time.Second
	backgroundChunk = 32
	// paceWeight is the weight of the newest measurement in the running means.
	paceWeight = 0.2
)

// pace measures what batches cost, for how many prompt tokens a batch may have beside the next tokens of running streams.
type pace struct {
	decode []float64 // seconds of a batch of so many next tokens alone; 0: not measured
	token  float64   // seconds that a prompt token adds to a batch with next tokens; 0: not measured
	mixed  int       // batches with both since one with next tokens alone
}

// observe takes the time of a batch with the next tokens of so many streams and so many tokens of prompts.
func (p *pace) observe(streams, prompt int, took time.Duration) {
	seconds := took.Seconds()
	switch {
	case streams == 0:
		return // larger batches cost less a token
	case prompt == 0:
		for len(p.decode) <= streams {
			p.decode = append(p.decode, 0)
		}
		mean(&p.decode[streams], seconds)
		p.mixed = 0
	default:
		p.mixed++
		if alone := p.alone(streams); alone > 0 {
			mean(&p.token, max(seconds-alone, 0.01*alone)/float64(prompt))
		}
	}
}

// alone is the time of a batch of next tokens, or of the nearest number of them that was measured; 0 if none was.
func (p *pace) alone(streams int) float64 {
	for d := range len(p.decode) + streams {
		if at := streams - d; at > 0 && at < len(p.decode) && p.decode[at] > 0 {
			return p.decode[at]
		}
		if at := streams + d; at < len(p.decode) && p.decode[at] > 0 {
			return p.decode[at]
		}
	}
	return 0
}

// chunk is how many prompt tokens a batch may have beside the next tokens of so many streams.
func (p *pace) chunk(streams int) int {
	if p.mixed >= refreshSteps {
		return 0
	}
	alone := p.alone(streams)
	if alone == 0 || p.token == 0 {
		return firstChunk
	}
	return max(leastChunk, int((maxSlowdown-1)*alone/p.token))
}

func mean(of *float64, value float64) {
	if *of == 0 {
		*of = value
		return
	}
	*of += paceWeight * (value - *of)
}
