package runner

import (
	"slices"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/prompt"
)

// tags are the names of control tokens that a parser reads.
var tags = []string{"<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>"}

// completion is one of a request's completions, sampled token by token. Those after the first begin with the logits of
// the first one's prompt, which is computed once.
type completion struct {
	request    *request
	vocabulary *llama.Model
	index      int
	limit      int // most tokens of prompt and completion
	sampler    *sampler
	constraint *constraint // nil: free text
	text       *text
	parser     *prompt.Parser // nil: the text is the content
	logProbs   bool
	top        int

	echo   []byte               // the prompt's text; nil if it is not wanted
	score  bool                 // the log-probabilities of the prompt's tokens are wanted
	scored []child.TokenLogProb // these, when all are computed
	last   []child.TokenLogProb // then also of the token that ended the completion
	only   bool                 // nothing is sampled
	next   []*completion        // of the first one: the others, until the prompt is computed

	written   int // tokens sampled
	reasoning int // of these
	unsettled int // tokens since the parser said anything, which are of what it says next
}

// read implements reader.
func (c *completion) read(q *sequence, outputs [][]float32) (finished bool, spawned []*sequence) {
	if c.score && q.from < q.prompt {
		c.scorePrompt(q, outputs)
	}
	q.from += len(outputs)
	if q.from < len(q.tokens) {
		return false, nil // the prompt goes on
	}
	logits := outputs[len(outputs)-1]
	if c.score && c.written == 0 {
		c.scored = c.entries(q)
	}
	for _, other := range c.next {
		twin := newSequence(q.request, slices.Clone(q.tokens), other)
		twin.prompt = q.prompt
		other.begin(c)
		if !other.step(twin, logits) {
			twin.from = len(twin.tokens) - 1
			spawned = append(spawned, twin)
		}
	}
	c.next = nil
	if c.written == 0 {
		c.begin(c)
	}
	finished = c.step(q, logits)
	q.from = len(q.tokens) - 1
	return finished, spawned
}

// foreseen implements foreseer: the next mask.
func (c *completion) foreseen() <-chan struct{} {
	if c.constraint == nil {
		return nil
	}
	return c.constraint.computing
}

// begin reports the prompt, as the first completion has computed it.
func (c *completion) begin(first *completion) {
	if first.echo != nil {
		c.request.out.put(child.GenerateEvent{Index: c.index, Text: validUTF8(first.echo), LogProbs: first.scored})
	}
}

// scorePrompt scores the prompt's tokens that come after those whose logits these are.
func (c *completion) scorePrompt(q *sequence, outputs [][]float32) {
	if q.from == 0 && len(q.scores) == 0 {
		q.scores = append(q.scores, score{logP: child.NoLogProb})
	}
	for i, logits := range outputs {
		if at := q.from + i + 1; at < q.prompt {
			logP, top := probabilities(logits, nil, q.tokens[at], c.top)
			q.scores = append(q.scores, score{logP, top})
		}
	}
}

// entries returns the log-probabilities of the prompt's tokens.
func (c *completion) entries(q *sequence) []child.TokenLogProb {
	entries := make([]child.TokenLogProb, 0, len(q.scores))
	for i, s := range q.scores {
		entries = append(entries, c.tokenLogProb(q.tokens[i], s.logP, s.top[:min(c.top, len(s.top))]))
	}
	return entries
}

func (c *completion) tokenLogProb(t engine.Token, p float64, top []tokenProbability) child.TokenLogProb {
	entry := c.entry(t, p)
	for _, other := range top {
		entry.Top = append(entry.Top, c.entry(other.token, other.logP))
	}
	return entry
}

// step samples the token that follows and reports it; it says whether it was the last.
func (c *completion) step(q *sequence, logits []float32) (finished bool) {
	if c.only {
		return c.finish(q, "length")
	}
	var mask []uint32
	if c.constraint != nil {
		var err error
		if mask, err = c.constraint.Mask(); err != nil {
			c.request.fail(err)
			return true
		}
	}
	token := c.sampler.pick(logits, mask)
	if token < 0 {
		c.request.fail(errNoToken)
		return true
	}
	entry := func() child.TokenLogProb {
		p, top := c.sampler.probabilities(logits, mask, token, c.top)
		return c.tokenLogProb(token, p, top)
	}
	if c.vocabulary.IsEndOfGeneration(token) {
		if c.score {
			// Who scores prompts (lm-evaluation-harness) takes the last entry for the token that max_tokens 1 asked for.
			c.last = []child.TokenLogProb{entry()}
		}
		return c.finish(q, "stop")
	}
	var logProb *child.TokenLogProb
	if c.logProbs {
		e := entry()
		logProb = &e
	}
	q.tokens = append(q.tokens, token)
	c.written++
	c.unsettled++
	c.sampler.accept(token)
	if c.constraint != nil {
		if err := c.constraint.Accept(token); err != nil {
			c.request.fail(err)
			return true
		}
	}
	var piece []byte
	if !c.vocabulary.IsControl(token) {
		piece = c.vocabulary.Piece(token)
	} else if name := c.vocabulary.Piece(token); c.parser != nil && slices.Contains(tags, string(name)) {
		piece = name // elsewhere, the name of a control token is no text
	}
	show, shown, stopped := c.text.add(piece, logProb)
	c.show(show, shown)
	switch {
	case stopped, c.constraint != nil && c.constraint.Stopped():
		return c.finish(q, "stop")
	case len(q.tokens) >= c.limit:
		return c.finish(q, "length")
	}
	if c.constraint != nil {
		c.constraint.Start()
	}
	return false
}

// show reports text that will not change any more.
func (c *completion) show(text string, logProbs []child.TokenLogProb) {
	if c.parser == nil {
		if text != "" || len(logProbs) > 0 {
			c.request.out.put(child.GenerateEvent{Index: c.index, Text: text, LogProbs: logProbs})
		}
		return
	}
	c.showDeltas(c.parser.Add(text))
	if len(logProbs) > 0 {
		c.request.out.put(child.GenerateEvent{Index: c.index, LogProbs: logProbs})
	}
}

func (c *completion) showDeltas(deltas []prompt.Delta) {
	for _, d := range deltas {
		if d.Reasoning != "" {
			c.reasoning += c.unsettled
		}
		c.unsettled = 0
		c.request.out.put(child.GenerateEvent{Index: c.index, Text: d.Text, Reasoning: d.Reasoning, ToolCalls: d.ToolCalls})
	}
}

func (c *completion) entry(token engine.Token, logP float64) child.TokenLogProb {
	return tokenEntry(c.vocabulary.Piece(token), logP)
}

// leastLogProb stands for a probability of 0, as in OpenAI's API: JSON has no infinity.
const leastLogProb = -9999

func tokenEntry(piece []byte, logP float64) child.TokenLogProb {
	if !(logP > leastLogProb) {
		logP = leastLogProb
	}
	return child.TokenLogProb{Token: validUTF8(piece), Bytes: piece, LogProb: logP}
}

func (c *completion) finish(q *sequence, reason string) bool {
	show, logProbs := c.text.finish()
	c.show(show, append(logProbs, c.last...))
	if c.parser != nil {
		c.showDeltas(c.parser.End())
		if c.parser.Called() && reason == "stop" {
			reason = "tool_calls"
		}
	}
	usage := child.Usage{CompletionTokens: c.written, ReasoningTokens: c.reasoning}
	if c.index == 0 { // the others have the prompt from this one
		usage.PromptTokens, usage.CachedTokens = q.prompt, max(q.cached, 0)
	}
	c.request.out.put(child.GenerateEvent{Index: c.index, FinishReason: reason, Usage: &usage})
	return true
}
