package runner

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

// request is what a caller waits for: sequences, and what they have to say.
type request struct {
	ctx        context.Context
	adapter    *adapter // nil: the base model
	clientName string
	background bool // it yields to requests that are not
	out        *outbox
	done       chan struct{} // closed when the scheduler has let go of all its sequences

	// The scheduler's:
	client *client
	first  []*sequence // until it has received them
	open   int         // sequences that it has not let go of
}

func newRequest(ctx context.Context, client string, a *adapter, completions int) *request {
	return &request{ctx: ctx, adapter: a, clientName: client, out: newOutbox(completions), done: make(chan struct{})}
}

// fail ends the request with an error; who takes its events cancels the rest of it.
func (r *request) fail(err error) {
	var refusal *child.Error
	if !errors.As(err, &refusal) {
		refusal = &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	r.out.fail(refusal)
}

// sequence is tokens that are computed one after the other. Between submit and the closing of its request's done it is
// the scheduler's.
type sequence struct {
	request *request
	reader  reader
	tokens  []engine.Token
	prompt  int         // of tokens, how many are the prompt's
	from    int         // outputs are wanted from this token on
	want    engine.Want // WantState: they are hidden states; else logits
	shared  bool        // what it has computed goes into the prefix cache
	parent  *sequence   // of a branch, which has a place with it; nil: none
	joined  func()      // is called when all branches have finished

	// Of a prompt that is to be scored; others have none.
	scored       bool
	alternatives int     // for each token
	scores       []score // of the tokens up to the one at from

	slot     *slot // nil while it waits
	computed int   // tokens in the slot
	cached   int   // prompt tokens that the prefix cache had; -1 before the first admission
	arrival  int64
	branches int  // that have not finished; until they have, nothing is computed here
	holds    bool // its adapter's weights
}

// newSequence returns a sequence whose last token's logits are wanted.
func newSequence(r *request, tokens []engine.Token, reader reader) *sequence {
	return &sequence{request: r, reader: reader, tokens: tokens, prompt: len(tokens), from: len(tokens) - 1, shared: true, cached: -1}
}

// left is how many tokens are to be computed now.
func (q *sequence) left() int {
	if q.branches > 0 {
		return 0
	}
	return len(q.tokens) - q.computed
}

// reader makes something of a sequence's outputs.
type reader interface {
	// read takes the outputs of the tokens from q.from on and moves q.from. It may append a token to q.tokens. It says
	// whether the sequence is finished, and returns others that are to be computed now. It runs in a goroutine of its own
	// beside those of other sequences of the batch; the outputs are valid until it returns.
	read(q *sequence, outputs [][]float32) (finished bool, spawned []*sequence)
}

// foreseer is a reader that goes on in the background, between two reads.
type foreseer interface {
	// foreseen is closed when that is done; nil if there is nothing.
	foreseen() <-chan struct{}
}

// outbox holds what the completions of a request have to say and its reader has not taken yet, joined to one event for
// each: a slow reader never holds up the batch, and what it leaves is bounded by the context.
type outbox struct {
	mu     sync.Mutex
	events []child.GenerateEvent // one a completion at most, in the order in which they began
	open   int                   // completions whose FinishReason was not taken
	usage  child.Usage
	err    *child.Error
	wake   chan struct{} // capacity 1
}

func newOutbox(completions int) *outbox {
	return &outbox{open: completions, wake: make(chan struct{}, 1)}
}

// put appends an event. With a FinishReason, Usage is what this completion adds to the request's.
func (o *outbox) put(e child.GenerateEvent) {
	o.mu.Lock()
	if e.Usage != nil {
		o.usage.PromptTokens += e.Usage.PromptTokens
		o.usage.CachedTokens += e.Usage.CachedTokens
		o.usage.CompletionTokens += e.Usage.CompletionTokens
		o.usage.ReasoningTokens += e.Usage.ReasoningTokens
		e.Usage = nil
	}
	at := slices.IndexFunc(o.events, func(have child.GenerateEvent) bool { return have.Index == e.Index })
	if at < 0 {
		o.events = append(o.events, e)
	} else {
		have := &o.events[at]
		have.Text += e.Text
		have.Reasoning += e.Reasoning
		have.ToolCalls = joinCalls(have.ToolCalls, e.ToolCalls)
		have.LogProbs = append(have.LogProbs, e.LogProbs...)
		if e.FinishReason != "" {
			have.FinishReason, have.ChoiceProbabilities = e.FinishReason, e.ChoiceProbabilities
		}
	}
	o.mu.Unlock()
	o.notify()
}

// joinCalls appends parts of tool calls, those of one call to what is there of it.
func joinCalls(have, more []child.ToolCallDelta) []child.ToolCallDelta {
	for _, call := range more {
		if n := len(have); n > 0 && have[n-1].Index == call.Index {
			have[n-1].ID += call.ID
			have[n-1].Name += call.Name
			have[n-1].Arguments += call.Arguments
			continue
		}
		have = append(have, call)
	}
	return have
}

// fail makes the next take return the error; the first one counts.
func (o *outbox) fail(err *child.Error) {
	o.mu.Lock()
	if o.err == nil {
		o.err = err
	}
	o.mu.Unlock()
	o.notify()
}

func (o *outbox) notify() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// take waits for the next event. The last one of all has the Usage. The error is what a sequence failed with, or the
// context's cause when that ends first.
func (o *outbox) take(ctx context.Context) (child.GenerateEvent, error) {
	for {
		o.mu.Lock()
		if o.err != nil {
			defer o.mu.Unlock()
			return child.GenerateEvent{}, o.err
		}
		if len(o.events) > 0 {
			defer o.mu.Unlock()
			event := o.events[0]
			o.events = slices.Delete(o.events, 0, 1)
			if event.FinishReason != "" {
				if o.open--; o.open == 0 {
					usage := o.usage
					event.Usage = &usage
				}
			}
			return event, nil
		}
		o.mu.Unlock()
		select {
		case <-o.wake:
		case <-ctx.Done():
			return child.GenerateEvent{}, context.Cause(ctx)
		}
	}
}

// failure returns what a sequence failed with, nil if none did.
func (o *outbox) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		return nil
	}
	return o.err
}
