package dataset

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
)

// examples draws rows that share beginnings by chance and by design: few tokens, short runs of one token, prompts that
// are repeated, and several candidates after some.
func drawExamples(t *rapid.T) []Example {
	token := rapid.Custom(func(t *rapid.T) engine.Token { return engine.Token(rapid.IntRange(0, 1).Draw(t, "token")) })
	run := rapid.Custom(func(t *rapid.T) []engine.Token {
		return slices.Repeat([]engine.Token{token.Draw(t, "of")}, rapid.IntRange(1, 12).Draw(t, "run"))
	})
	tokens := func(label string, least int) []engine.Token {
		return slices.Concat(rapid.SliceOfN(run, least, 4).Draw(t, label)...)
	}
	prompts := [][]engine.Token{tokens("prompt", 1), tokens("other prompt", 1)}
	weight := rapid.SampledFrom([]float32{0, 0, 1, 1, 0.5})
	var examples []Example
	for i := range rapid.IntRange(1, 12).Draw(t, "examples") {
		e := Example{Row: i}
		before := slices.Concat(prompts[rapid.IntRange(0, 1).Draw(t, "which")], tokens("middle", 0))
		for range rapid.IntRange(1, 4).Draw(t, "candidates") {
			c := prompt.Row{Tokens: slices.Concat(before, tokens("answer", 1))}
			for range c.Tokens {
				c.Weights = append(c.Weights, weight.Draw(t, "weight"))
			}
			e.Tokens += len(c.Tokens)
			e.Candidates = append(e.Candidates, c)
		}
		examples = append(examples, e)
	}
	return examples
}

// Whatever rows share: every candidate's path through the segments holds its own tokens, its targets ask for its own
// labels after its own tokens, and the weights of a micro-batch's targets are those of its candidates.
func TestPackedPathsAreTheRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		examples := drawExamples(t)
		limit := rapid.IntRange(1, 300).Draw(t, "limit")
		share := rapid.Bool().Draw(t, "share")
		var seen [][2]int
		tokens := 0
		for _, m := range Pack(examples, limit, share) {
			checkSegments(t, m)
			if first, last := m.Candidates[0].Example, m.Candidates[len(m.Candidates)-1].Example; len(m.Batch.Tokens) > limit && first != last {
				t.Fatalf("%d tokens of examples %d to %d, limit %d", len(m.Batch.Tokens), first, last, limit)
			}
			tokens += m.Tokens
			weights := make([]float64, len(m.Batch.Targets))
			for _, c := range m.Candidates {
				seen = append(seen, [2]int{c.Example, c.Index})
				row := examples[c.Example].Candidates[c.Index]
				checkCandidate(t, m, c, row)
				for i, target := range c.Targets {
					weights[target] += float64(c.Weights[i])
				}
				if !share {
					for _, target := range c.Targets {
						if o := m.Owners[m.Batch.Targets[target].Position]; int(o.Row) != examples[c.Example].Row {
							t.Fatalf("a token of row %d belongs to row %d", examples[c.Example].Row, o.Row)
						}
					}
				}
			}
			for i, target := range m.Batch.Targets {
				if math.Abs(weights[i]-float64(target.Weight)) > 1e-5 {
					t.Fatalf("target %+v, its candidates weigh %g", target, weights[i])
				}
			}
		}
		var want [][2]int
		for i, e := range examples {
			tokens -= e.Tokens
			for c := range e.Candidates {
				want = append(want, [2]int{i, c})
			}
		}
		if !slices.Equal(seen, want) || tokens != 0 {
			t.Fatalf("packed candidates %v, expected %v; %d tokens too many", seen, want, tokens)
		}
	})
}

// checkSegments checks what engine.Batch promises, and the owners.
func checkSegments(t *rapid.T, m Micro) {
	b := m.Batch
	if len(b.Targets) > 0 {
		if err := b.Validate(2); err != nil {
			t.Fatal(err)
		}
	}
	if len(m.Owners) != len(b.Tokens) {
		t.Fatalf("%d owners of %d tokens", len(m.Owners), len(b.Tokens))
	}
	for i, p := range b.Positions() {
		if int(m.Owners[i].Position) != p {
			t.Fatalf("token %d is at position %d of its row, the owner says %d", i, p, m.Owners[i].Position)
		}
	}
}

func checkCandidate(t *rapid.T, m Micro, c Candidate, row prompt.Row) {
	last, n := -1, 0
	for i, w := range row.Weights {
		if i == 0 || w == 0 {
			continue
		}
		target := m.Batch.Targets[c.Targets[n]]
		if target.Label != row.Tokens[i] || c.Weights[n] != w {
			t.Fatalf("target %d of a row is %+v with weight %g, expected token %d with weight %g", n, target, c.Weights[n], row.Tokens[i], w)
		}
		last = target.Position
		n++
	}
	if n != len(c.Targets) || n != len(c.Weights) {
		t.Fatalf("%d targets, %d weights, expected %d", len(c.Targets), len(c.Weights), n)
	}
	if n == 0 {
		return
	}
	var path []engine.Token
	segment := slices.IndexFunc(m.Batch.Segments, func(s engine.Segment) bool { return s.Start <= last && last < s.End })
	for end := last + 1; segment >= 0; {
		s := m.Batch.Segments[segment]
		path = slices.Concat(m.Batch.Tokens[s.Start:end], path)
		if segment = s.Parent; segment >= 0 {
			end = m.Batch.Segments[segment].End
		}
	}
	if want := row.Tokens[:lastTarget(row)]; !slices.Equal(path, want) {
		t.Fatalf("the path has tokens %v, the row %v", path, want)
	}
}

func TestPackShares(t *testing.T) {
	long := make([]engine.Token, 25)
	for i := range long {
		long[i] = engine.Token(100 + i)
	}
	row := func(tokens ...engine.Token) prompt.Row {
		r := prompt.Row{Tokens: slices.Concat(long, tokens), Weights: make([]float32, len(long)+len(tokens))}
		for i := len(long); i < len(r.Weights); i++ {
			r.Weights[i] = 1
		}
		return r
	}
	choices := Example{Candidates: []prompt.Row{row(1), row(2), row(3), row(4)}}
	pair := Example{Row: 1, Candidates: []prompt.Row{row(1, 2, 3), row(2, 3, 4, 5)}}
	for name, test := range map[string]struct {
		examples []Example
		share    bool
		segments []engine.Segment
		targets  int
	}{
		"choices of one token need no segment":    {[]Example{choices}, false, []engine.Segment{{Start: 0, End: 25, Parent: -1}}, 4},
		"the answers of a pair follow its prompt": {[]Example{pair}, false, []engine.Segment{{Start: 0, End: 25, Parent: -1}, {Start: 25, End: 27, Parent: 0}, {Start: 27, End: 30, Parent: 0}}, 7},
		"examples share only when asked to": {
			[]Example{choices, pair}, false,
			[]engine.Segment{{Start: 0, End: 25, Parent: -1}, {Start: 25, End: 50, Parent: -1}, {Start: 50, End: 52, Parent: 1}, {Start: 52, End: 55, Parent: 1}}, 11,
		},
		"examples share": {
			[]Example{choices, pair}, true,
			[]engine.Segment{{Start: 0, End: 25, Parent: -1}, {Start: 25, End: 27, Parent: 0}, {Start: 27, End: 30, Parent: 0}}, 9,
		},
	} {
		t.Run(name, func(t *testing.T) {
			micros := Pack(test.examples, 1000, test.share)
			if len(micros) != 1 || !slices.Equal(micros[0].Batch.Segments, test.segments) || len(micros[0].Batch.Targets) != test.targets {
				t.Errorf("got %d micro-batches, the first %+v", len(micros), micros[0].Batch)
			}
		})
	}
}
