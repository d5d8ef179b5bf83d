package runner

import (
	"slices"

	"github.com/hone-llm/hone/internal/engine"
)

// score is what the model thought of a prompt's token before it: its log-probability and the likeliest tokens there, in
// descending order. The first token of a sequence has none.
//
// The prefix cache keeps scores beside the tokens, so that a context that several continuations share, as in
// lm-evaluation-harness's multiple-choice tasks, is computed once although its scores are wanted every time.
type score struct {
	logP float64
	top  []tokenProbability
}

// scores returns the scores of the first tokens, as many as the tree has, with at least so many alternatives each.
func (r *radix) scores(a *adapter, tokens []engine.Token, alternatives int) (found []score) {
	at := r.roots[a]
	for at != nil && len(found) < len(tokens) {
		if at = at.child(tokens[len(found)]); at == nil {
			break
		}
		common := commonPrefix(at.tokens, tokens[len(found):])
		for i, s := range at.scores[:min(common, len(at.scores))] {
			if len(s.top) < alternatives && at.depth-len(at.tokens)+i > 0 {
				return found
			}
			found = append(found, s)
		}
		if len(found) < at.depth {
			break
		}
	}
	return found
}

// note keeps the scores of a slot's first tokens.
func (r *radix) note(s *slot, scores []score) {
	for at := s.node; at != nil && at.parent != nil; at = at.parent {
		first := at.depth - len(at.tokens)
		if first >= len(scores) {
			continue
		}
		for i, known := range scores[first:min(at.depth, len(scores))] {
			switch {
			case i == len(at.scores):
				at.scores = append(at.scores, known)
			case len(at.scores[i].top) < len(known.top):
				at.scores[i] = known
			}
		}
	}
}

// splitScores divides a node's scores where its first tokens end.
func splitScores(scores []score, first int) (before, after []score) {
	first = min(first, len(scores))
	return slices.Clone(scores[:first]), slices.Clone(scores[first:])
}
