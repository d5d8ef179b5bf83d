package client

import (
	"math"
	"testing"
)

func TestWilson(t *testing.T) {
	t.Parallel()
	// Values of R: prop.test(x, n, correct=FALSE)$conf.int, and of Newcombe (1998), table I.
	for _, test := range []struct {
		right, n  int
		low, high float64
	}{
		{81, 263, 0.2553, 0.3662},
		{15, 148, 0.0624, 0.1605},
		{0, 20, 0, 0.1611},
		{1, 29, 0.0061, 0.1718},
		{29, 29, 0.8830, 1},
		{0, 0, 0, 1},
	} {
		low, high := Wilson(test.right, test.n)
		if math.Abs(low-test.low) > 6e-5 || math.Abs(high-test.high) > 6e-5 {
			t.Errorf("%d of %d: [%.4f, %.4f], want [%.4f, %.4f]", test.right, test.n, low, high, test.low, test.high)
		}
	}
}

func TestMcNemar(t *testing.T) {
	t.Parallel()
	// Twice the binomial tail, in exact fractions: (1+22+231+1540+7315+26334+74613) / 2^22 for 6 of 22.
	for _, test := range []struct {
		b, c int
		want float64
	}{
		{0, 0, 1},
		{5, 5, 1},
		{1, 1, 1},
		{0, 1, 1},
		{0, 6, 0.03125},
		{10, 2, 0.03857421875},
		{2, 10, 0.03857421875},
		{6, 16, 2 * 110056.0 / 4194304},
		{0, 170, 2 * math.Pow(2, -170)},
	} {
		if got := McNemar(test.b, test.c); math.Abs(got-test.want) > 1e-9*math.Max(test.want, 1e-60) {
			t.Errorf("McNemar(%d, %d) = %g, want %g", test.b, test.c, got, test.want)
		}
	}
}
