package runner

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
)

// choice scores the choices of a request as wholes and answers with one: the likeliest, or with a temperature one drawn
// by their probabilities. A choice's probability is the product of its tokens' as the tokenizer spells it after the prompt,
// normalised over the choices. Where one choice is the beginning of another, the end of the turn after it counts as
// well, for all of them.
//
// Choices of one token each are scored by the prompt's last logits. Others need the logits after their first tokens, so
// sequences that share the prompt, the branches, are computed, all in one batch where they fit.
type choice struct {
	request    *request
	vocabulary *llama.Model
	ends       []engine.Token // end a turn
	samplers   []*sampler     // of the completions
	bias       *sampler       // knows the request's logit_bias
	texts      []string
	spellings  [][]engine.Token
	logProbs   bool
	top        int

	root   *spelled
	ending bool // the end of the turn counts
}

// spelled is a node of the tree of the choices' spellings.
type spelled struct {
	children []*spelled
	token    engine.Token
	logP     float64 // of token after the ones before, of the whole vocabulary; at the root, up to the same term for all
	end      float64 // of the end of the turn after it, if it counts
	choices  []int   // that begin with the tokens up to here
	whole    int     // the choice that ends here, -1 if none does
}

// newChoice checks the choices and builds their tree. Its error is a *child.Error.
func newChoice(texts []string, spell func(string) ([]engine.Token, error)) (*choice, error) {
	refuse := func(format string, args ...any) (*choice, error) {
		return nil, &child.Error{Code: child.CodeInvalidRequest, Param: "choices", Message: "choices: " + fmt.Sprintf(format, args...)}
	}
	if len(texts) == 0 {
		return refuse("the list is empty")
	}
	if len(texts) > maxChoices {
		return refuse("there are %d, at most %d are allowed", len(texts), maxChoices)
	}
	c := &choice{texts: texts, root: &spelled{whole: -1}}
	for i, text := range texts {
		spelling, err := spell(text)
		if err != nil {
			return refuse("[%d]: %v", i, err)
		}
		if len(spelling) == 0 {
			return refuse("[%d] is empty", i)
		}
		at := c.root
		at.choices = append(at.choices, i)
		for _, token := range spelling {
			next := at.child(token)
			if next == nil {
				next = &spelled{token: token, whole: -1}
				at.children = append(at.children, next)
			}
			at = next
			at.choices = append(at.choices, i)
		}
		if at.whole >= 0 {
			return refuse("[%d] and [%d] are the same to the model: %q, %q", at.whole, i, texts[at.whole], text)
		}
		at.whole = i
		c.spellings = append(c.spellings, spelling)
	}
	c.root.walk(func(n *spelled) { c.ending = c.ending || n.whole >= 0 && len(n.children) > 0 })
	return c, nil
}

func (n *spelled) child(token engine.Token) *spelled {
	for _, c := range n.children {
		if c.token == token {
			return c
		}
	}
	return nil
}

func (n *spelled) walk(f func(*spelled)) {
	f(n)
	for _, c := range n.children {
		c.walk(f)
	}
}

// longest is the number of tokens of the longest choice.
func (c *choice) longest() int {
	n := 0
	for _, spelling := range c.spellings {
		n = max(n, len(spelling))
	}
	return n
}

// read implements reader: the prompt is computed.
func (c *choice) read(q *sequence, outputs [][]float32) (finished bool, spawned []*sequence) {
	q.from = len(q.tokens)
	c.score(c.root, outputs[len(outputs)-1])
	c.branch(c.root, q, nil, &spawned)
	if len(spawned) == 0 {
		c.answer(q)
		return true, nil
	}
	q.joined = func() { c.answer(q) }
	return false, spawned
}

// branch appends sequences that compute the nodes below n whose logits are needed. A path's nodes are computed by one
// sequence, each node by one.
func (c *choice) branch(n *spelled, q *sequence, path []*spelled, spawned *[]*sequence) {
	deeper := false
	for _, next := range n.children {
		if len(next.children) > 0 || c.ending {
			// What the path before needs is computed by the first child's sequence.
			if deeper {
				path = make([]*spelled, len(path))
			}
			deeper = true
			c.branch(next, q, append(slices.Clip(path), next), spawned)
		}
	}
	if deeper || n == c.root {
		return
	}
	b := &branch{choice: c, nodes: path}
	child := newSequence(q.request, slices.Concat(q.tokens, c.spellings[n.choices[0]][:len(path)]), b)
	child.prompt, child.cached, child.from, child.parent = q.prompt, q.cached, q.prompt+b.skip(), q
	*spawned = append(*spawned, child)
}

// branch computes the logits after the first tokens of choices.
type branch struct {
	choice *choice
	nodes  []*spelled // of the tokens after the prompt; nil where another branch computes them
	at     int
}

// skip leaves out the nodes at the beginning that another branch computes.
func (b *branch) skip() int {
	for b.at < len(b.nodes) && b.nodes[b.at] == nil {
		b.at++
	}
	return b.at
}

// read implements reader.
func (b *branch) read(q *sequence, outputs [][]float32) (finished bool, spawned []*sequence) {
	for _, logits := range outputs {
		if n := b.nodes[b.at]; n != nil {
			b.choice.score(n, logits)
		}
		b.at++
	}
	q.from += len(outputs)
	return b.at == len(b.nodes), nil
}

// score notes the log-probabilities of what can follow a node.
func (c *choice) score(n *spelled, logits []float32) {
	logits = c.bias.biased(logits)
	norm := 0.0
	if n != c.root { // every choice has the root's, so it has no effect on their probabilities
		norm = logSumExp(len(logits), func(i int) float64 { return float64(logits[i]) })
	}
	for _, next := range n.children {
		next.logP = float64(logits[next.token]) - norm
	}
	if c.ending {
		n.end = logSumExp(len(c.ends), func(i int) float64 { return float64(logits[c.ends[i]]) }) - norm
	}
}

// answer reports the completions: everything is computed.
func (c *choice) answer(q *sequence) {
	scores := make([]float64, len(c.texts)) // log-probabilities, normalised
	for i, spelling := range c.spellings {
		at := c.root
		for _, token := range spelling {
			at = at.child(token)
			scores[i] += at.logP
		}
		if c.ending {
			scores[i] += at.end
		}
	}
	norm := logSumExp(len(scores), func(i int) float64 { return scores[i] })
	probabilities := make([]float64, len(scores))
	for i := range scores {
		scores[i] -= norm
		if math.IsNaN(scores[i]) {
			scores[i] = math.Inf(-1)
		}
		probabilities[i] = math.Exp(scores[i])
	}
	for index, sampler := range c.samplers {
		chosen := 0
		for i, score := range scores {
			if score > scores[chosen] {
				chosen = i
			}
		}
		if sampler.random != nil {
			logits := make([]float32, len(scores))
			for i, score := range scores {
				logits[i] = float32(score)
			}
			chosen = int(sampler.pick(logits, nil))
		}
		event := child.GenerateEvent{
			Index: index, Text: c.texts[chosen], FinishReason: "stop", ChoiceProbabilities: probabilities,
			Usage: &child.Usage{CompletionTokens: len(c.spellings[chosen])},
		}
		if index == 0 {
			event.Usage.PromptTokens, event.Usage.CachedTokens = q.prompt, max(q.cached, 0)
		}
		if c.logProbs {
			event.LogProbs = c.entries(chosen, scores)
		}
		c.request.out.put(event)
	}
}

// entries returns the log-probabilities of the answer's tokens, each over the choices that begin with the tokens before.
// Their sum is the log-probability of the choice: where another choice goes on from the end of this one, an entry
// without bytes stands for the end.
func (c *choice) entries(chosen int, scores []float64) []child.TokenLogProb {
	mass := func(n *spelled) float64 {
		return logSumExp(len(n.choices), func(i int) float64 { return scores[n.choices[i]] })
	}
	var entries []child.TokenLogProb
	at := c.root
	for depth := 0; ; depth++ {
		total := mass(at)
		var taken child.TokenLogProb
		var all []child.TokenLogProb
		add := func(piece []byte, logP float64, is bool) {
			e := tokenEntry(piece, logP)
			all = append(all, e)
			if is {
				taken = e
			}
		}
		if at.whole >= 0 {
			if len(at.children) == 0 {
				return entries
			}
			add(nil, scores[at.whole]-total, at.whole == chosen)
		}
		var next *spelled
		for _, n := range at.children {
			is := depth < len(c.spellings[chosen]) && n.token == c.spellings[chosen][depth]
			add(c.vocabulary.Piece(n.token), mass(n)-total, is)
			if is {
				next = n
			}
		}
		slices.SortStableFunc(all, func(a, b child.TokenLogProb) int { return cmp.Compare(b.LogProb, a.LogProb) })
		taken.Top = all[:min(c.top, len(all))]
		entries = append(entries, taken)
		if next == nil {
			return entries
		}
		at = next
	}
}

// logSumExp is the logarithm of the sum of the exponentials of n numbers.
func logSumExp(n int, of func(int) float64) float64 {
	top := math.Inf(-1)
	for i := range n {
		top = max(top, of(i))
	}
	if math.IsInf(top, 0) {
		return top
	}
	sum := 0.0
	for i := range n {
		sum += math.Exp(of(i) - top)
	}
	return top + math.Log(sum)
}
