package client

import "math"

// Wilson returns the 95% confidence interval of a rate of which right out of n were seen: Wilson's score interval, which
// keeps inside [0, 1] also for small n. For n = 0 it is [0, 1].
func Wilson(right, n int) (low, high float64) {
	if n == 0 {
		return 0, 1
	}
	const z = 1.959963984540054 // the normal distribution's 97.5% point
	p, count := float64(right)/float64(n), float64(n)
	center := p + z*z/(2*count)
	half := z * math.Sqrt(p*(1-p)/count+z*z/(4*count*count))
	scale := 1 + z*z/count
	return max(0, (center-half)/scale), min(1, (center+half)/scale)
}

// McNemar returns the two-sided p-value of McNemar's exact test: whether two models that answered the same questions
// differ. onlyFirst questions were right with the first model only, onlySecond with the second only.
func McNemar(onlyFirst, onlySecond int) float64 {
	n, k := onlyFirst+onlySecond, min(onlyFirst, onlySecond)
	if n == 0 {
		return 1
	}
	logFactorial := func(i int) float64 {
		v, _ := math.Lgamma(float64(i) + 1)
		return v
	}
	var tail float64 // P(X <= k) of the binomial distribution with n trials at 1/2
	for i := 0; i <= k; i++ {
		tail += math.Exp(logFactorial(n) - logFactorial(i) - logFactorial(n-i) - float64(n)*math.Ln2)
	}
	return min(1, 2*tail)
}
