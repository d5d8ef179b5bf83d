package runner

import (
	"fmt"
	"slices"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"pgregory.net/rapid"
)

// The tree against a plain map from slots to their tokens.
func TestRadix(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r := newRadix()
		adapters := []*adapter{nil, {id: "a"}}
		slots := make([]*slot, 6)
		for i := range slots {
			slots[i] = &slot{number: engine.Sequence(i)}
		}
		type content struct {
			adapter *adapter
			tokens  []engine.Token
		}
		model := map[*slot]content{}
		step := int64(0)
		// scoreOf is a score that follows from the tokens up to its own.
		scoreOf := func(a *adapter, tokens []engine.Token, alternatives int) score {
			h := toyHash(fmt.Sprint(a != nil))
			for _, token := range tokens {
				h = toyNext(h, "", token)
			}
			s := score{logP: float64(h % 1000)}
			if len(tokens) > 1 {
				s.top = make([]tokenProbability, alternatives)
			}
			return s
		}
		draw := func(label string, min int) []engine.Token {
			// Three tokens: prefixes are often shared.
			return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) engine.Token { return engine.Token(rapid.IntRange(1, 3).Draw(t, "token")) }), min, 8).Draw(t, label)
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				for _, s := range slots {
					if got, want := s.held(), len(model[s].tokens); got != want {
						t.Fatalf("slot %d holds %d tokens, want %d", s.number, got, want)
					}
				}
				count := 0
				for a, root := range r.roots {
					count += len(root.below(nil))
					checkScores(t, root, nil, func(tokens []engine.Token, s score) bool {
						return s.logP == scoreOf(a, tokens, 0).logP
					})
					checkNode(t, root, nil, func(s *slot, tokens []engine.Token) {
						if model[s].adapter != a || !slices.Equal(model[s].tokens, tokens) {
							t.Fatalf("slot %d ends after %v, want %v", s.number, tokens, model[s].tokens)
						}
					})
				}
				if count != len(model) {
					t.Fatalf("the tree has %d slots, want %d", count, len(model))
				}
			},
			"add": func(t *rapid.T) {
				s := rapid.SampledFrom(slots).Draw(t, "slot")
				if s.node != nil {
					t.Skip()
				}
				step++
				a, tokens := rapid.SampledFrom(adapters).Draw(t, "adapter"), draw("tokens", 1)
				r.add(s, a, tokens, step)
				model[s] = content{a, tokens}
			},
			"extend": func(t *rapid.T) {
				s := rapid.SampledFrom(slots).Draw(t, "slot")
				if s.node == nil {
					t.Skip()
				}
				step++
				tokens := draw("tokens", 0)
				r.extend(s, tokens, step)
				model[s] = content{model[s].adapter, slices.Concat(model[s].tokens, tokens)}
			},
			"cut": func(t *rapid.T) {
				s := rapid.SampledFrom(slots).Draw(t, "slot")
				if s.node == nil {
					t.Skip()
				}
				n := rapid.IntRange(0, s.held()).Draw(t, "n")
				r.cut(s, n)
				model[s] = content{model[s].adapter, model[s].tokens[:n]}
				if n == 0 {
					delete(model, s)
				}
			},
			"note": func(t *rapid.T) {
				s := rapid.SampledFrom(slots).Draw(t, "slot")
				if s.node == nil {
					t.Skip()
				}
				c, alternatives := model[s], rapid.IntRange(0, 2).Draw(t, "alternatives")
				var scores []score
				for i := range rapid.IntRange(1, len(c.tokens)).Draw(t, "n") {
					scores = append(scores, scoreOf(c.adapter, c.tokens[:i+1], alternatives))
				}
				r.note(s, scores)
				if got := r.scores(c.adapter, c.tokens, alternatives); len(got) < len(scores) {
					t.Fatalf("of %d scores of %v there are %d", len(scores), c.tokens, len(got))
				}
			},
			"own": func(t *rapid.T) {
				s := rapid.SampledFrom(slots).Draw(t, "slot")
				s.owner = rapid.SampledFrom([]*sequence{nil, {}}).Draw(t, "owner")
			},
			"forget": func(t *rapid.T) {
				a := rapid.SampledFrom(adapters).Draw(t, "adapter")
				for _, s := range r.forget(a) {
					if model[s].adapter != a {
						t.Fatalf("slot %d was forgotten with another's adapter", s.number)
					}
					delete(model, s)
				}
			},
			"match": func(t *rapid.T) {
				a, tokens := rapid.SampledFrom(adapters).Draw(t, "adapter"), draw("tokens", 0)
				want, whole := 0, 0
				for s, c := range model {
					if c.adapter != a {
						continue
					}
					n := commonPrefix(c.tokens, tokens)
					want = max(want, n)
					if n == len(c.tokens) && s.owner == nil {
						whole = max(whole, n)
					}
				}
				n, at := r.match(a, tokens)
				if n != want || (at == nil) != (n == 0) {
					t.Fatalf("%v matches %d tokens, want %d", tokens, n, want)
				}
				if at != nil {
					if got := model[at.holder()]; got.adapter != a || commonPrefix(got.tokens, tokens) < n {
						t.Fatalf("the holder of %d tokens of %v holds %v", n, tokens, got.tokens)
					}
				}
				for alternatives := range 3 {
					scores := r.scores(a, tokens, alternatives)
					if len(scores) > n {
						t.Fatalf("%d scores of %d tokens", len(scores), n)
					}
					for i, s := range scores {
						if s.logP != scoreOf(a, tokens[:i+1], 0).logP || i > 0 && len(s.top) < alternatives {
							t.Fatalf("token %d of %v has the score %+v", i, tokens, s)
						}
					}
				}
				if s := r.matchWhole(a, tokens); (s == nil) != (whole == 0) || s != nil && (s.owner != nil || s.held() != whole) {
					t.Fatalf("%v begins with a whole idle slot of %d tokens, got %v", tokens, whole, s)
				}
			},
			"victim": func(t *rapid.T) {
				s := victim(slots, false)
				idle, redundant := 0, 0
				for o, c := range model {
					if o.owner != nil {
						continue
					}
					idle++
					for p, d := range model {
						if p != o && d.adapter == c.adapter && commonPrefix(d.tokens, c.tokens) == len(c.tokens) {
							redundant++
							break
						}
					}
				}
				if (s == nil) != (idle == 0) {
					t.Fatalf("victim %v of %d idle slots", s, idle)
				}
				if s == nil {
					return
				}
				others := 0 // hold its tokens too
				for p, d := range model {
					if p != s && d.adapter == model[s].adapter && commonPrefix(d.tokens, model[s].tokens) == s.held() {
						others++
					}
				}
				if s.owner != nil || redundant > 0 && others == 0 {
					t.Fatalf("victim %d, while %d idle slots hold nothing of their own", s.number, redundant)
				}
			},
		})
	})
}

// checkScores checks the scores of a subtree.
func checkScores(t *rapid.T, n *node, before []engine.Token, right func([]engine.Token, score) bool) {
	tokens := slices.Concat(before, n.tokens)
	if len(n.scores) > len(n.tokens) {
		t.Fatalf("a node of %d tokens has %d scores", len(n.tokens), len(n.scores))
	}
	for i, s := range n.scores {
		if !right(tokens[:len(before)+i+1], s) {
			t.Fatalf("token %d of %v has the score %+v", len(before)+i, tokens, s)
		}
	}
	for _, c := range n.children {
		checkScores(t, c, tokens, right)
	}
}

// checkNode checks the rules of a subtree and calls end for every slot with its tokens.
func checkNode(t *rapid.T, n *node, before []engine.Token, end func(*slot, []engine.Token)) {
	tokens := slices.Concat(before, n.tokens)
	if n.depth != len(tokens) {
		t.Fatalf("a node after %v has depth %d", tokens, n.depth)
	}
	if n.parent != nil && (len(n.tokens) == 0 || len(n.slots) == 0 && len(n.children) < 2) {
		t.Fatalf("the node %v after %v has %d slots and %d children", n.tokens, before, len(n.slots), len(n.children))
	}
	first := map[engine.Token]bool{}
	for _, s := range n.slots {
		if s.node != n {
			t.Fatalf("slot %d is not where it ends", s.number)
		}
		end(s, tokens)
	}
	for _, c := range n.children {
		if c.parent != n || first[c.tokens[0]] || c.used > n.used {
			t.Fatal(fmt.Sprintf("child %v of %v: wrong parent, or a twin, or used after its parent (%d, %d)", c.tokens, tokens, c.used, n.used))
		}
		first[c.tokens[0]] = true
		checkNode(t, c, tokens, end)
	}
}
