package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"math"
	"net"
	"net/http"
	"runtime/debug"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Generator computes with models; child.Runners implements it.
type Generator interface {
	// Generate yields the events of the completions of one prompt, the last one with Usage, or an error. Breaking off the
	// loop or ending ctx cancels the completions.
	Generate(ctx context.Context, base child.Base, req child.GenerateRequest) iter.Seq2[child.GenerateEvent, error]
	Embed(ctx context.Context, base child.Base, req child.EmbedRequest) (child.EmbedResponse, error)
	Tokenize(ctx context.Context, base child.Base, req child.TokenizeRequest) (child.TokenizeResponse, error)
	Models() []child.ModelState // of the base models that were asked for
}

// maxInFlight bounds how much of one request is computed at a time: its prompts, its questions.
const maxInFlight = 8

// generate computes the requests, which ask for equally many completions each, and yields their events as they come, but
// for one Usage, in the last event, which is the sum. Completion i of request p has the index p*n + i.
func (s *Server) generate(ctx context.Context, base child.Base, requests []child.GenerateRequest) iter.Seq2[child.GenerateEvent, error] {
	if len(requests) == 1 {
		return whole(s.generator.Generate(ctx, base, requests[0]), max(requests[0].N, 1))
	}
	return func(yield func(child.GenerateEvent, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		events := make(chan child.GenerateEvent)
		var failed error
		go func() { // it ends when events is read to its end
			defer close(events)
			failed = each(ctx, len(requests), func(ctx context.Context, p int) error {
				n := max(requests[p].N, 1)
				for event, err := range whole(s.generator.Generate(ctx, base, requests[p]), n) {
					if err != nil {
						return err
					}
					event.Index += p * n
					select {
					case events <- event:
					case <-ctx.Done():
						return context.Cause(ctx)
					}
				}
				return nil
			})
		}()
		defer func() {
			cancel()
			for range events { // nothing of it goes on after the loop
			}
		}()
		var usage child.Usage
		for event := range events {
			if event.Usage != nil {
				addUsage(&usage, *event.Usage)
				event.Usage = nil
			}
			if !yield(event, nil) {
				return
			}
		}
		if failed != nil {
			yield(child.GenerateEvent{}, failed)
			return
		}
		yield(child.GenerateEvent{Usage: &usage}, nil)
	}
}

// each calls do with 0 to n-1, maxInFlight of them at a time, and returns when all have returned: with the first error,
// which ends ctx for the others. A panic becomes an error, as in a handler.
func each(ctx context.Context, n int, do func(ctx context.Context, i int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxInFlight)
	for i := range n {
		group.Go(func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
				}
			}()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return do(ctx, i)
		})
	}
	return group.Wait()
}

// whole passes on the events of n completions and fails if they do not come to an end: every completion has a reason for
// its end before the usage.
func whole(events iter.Seq2[child.GenerateEvent, error], n int) iter.Seq2[child.GenerateEvent, error] {
	return func(yield func(child.GenerateEvent, error) bool) {
		finished := make([]bool, n)
		left := n
		for event, err := range events {
			switch {
			case err != nil:
			case event.Index < 0 || event.Index >= n:
				err = fmt.Errorf("the runner sent an event of completion %d of %d", event.Index, n)
			case event.FinishReason != "" && !finished[event.Index]:
				finished[event.Index] = true
				left--
			}
			if err == nil && event.Usage != nil && left > 0 {
				err = fmt.Errorf("the runner sent the usage while %d of %d completions were not finished", left, n)
			}
			if err != nil {
				yield(child.GenerateEvent{}, err)
				return
			}
			if !yield(event, nil) || event.Usage != nil {
				return
			}
		}
		yield(child.GenerateEvent{}, child.ErrEnded)
	}
}

// newID returns an id that no other completion has.
func newID(prefix string) string { return prefix + strings.ToLower(rand.Text()) }

// partID is the runner's name of prompt p of a request.
func partID(id string, p int) string {
	if p == 0 {
		return id
	}
	return fmt.Sprintf("%s-%d", id, p)
}

// clientOf says whose a request is, for fair queueing: a key's hash, or else the address that it came from.
func clientOf(r *http.Request) string {
	if key := r.Header.Get("Authorization"); key != "" {
		sum := sha256.Sum256([]byte(key))
		return "key:" + hex.EncodeToString(sum[:8])
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	return "addr:" + host
}

// collected are whole completions.
type collected struct {
	choices []collectedChoice
	usage   wire.Usage
}

type collectedChoice struct {
	text, reasoning     string
	toolCalls           []wire.ToolCall
	logProbs            []child.TokenLogProb
	choiceProbabilities []float64
	finishReason        string
}

// collect reads n completions to their end.
func collect(events iter.Seq2[child.GenerateEvent, error], n int) (collected, error) {
	all := collected{choices: make([]collectedChoice, n)}
	texts, reasonings := make([]strings.Builder, n), make([]strings.Builder, n)
	arguments := make([][]*strings.Builder, n)
	for event, err := range events {
		if err != nil {
			return collected{}, err
		}
		choice := &all.choices[event.Index]
		texts[event.Index].WriteString(event.Text)
		reasonings[event.Index].WriteString(event.Reasoning)
		choice.logProbs = append(choice.logProbs, event.LogProbs...)
		for _, call := range event.ToolCalls {
			if call.Index < 0 || call.Index > len(choice.toolCalls) {
				return collected{}, fmt.Errorf("the runner sent a part of tool call %d after %d calls", call.Index, len(choice.toolCalls))
			}
			if call.Index == len(choice.toolCalls) {
				choice.toolCalls = append(choice.toolCalls, wire.ToolCall{ID: call.ID, Type: "function", Function: wire.FunctionCall{Name: call.Name}})
				arguments[event.Index] = append(arguments[event.Index], new(strings.Builder))
			}
			arguments[event.Index][call.Index].WriteString(call.Arguments)
		}
		if event.FinishReason != "" {
			choice.finishReason, choice.choiceProbabilities = event.FinishReason, event.ChoiceProbabilities
		}
		if event.Usage != nil {
			all.usage = usageToWire(event.Usage)
		}
	}
	for i := range all.choices {
		all.choices[i].text, all.choices[i].reasoning = texts[i].String(), reasonings[i].String()
		for j := range arguments[i] {
			all.choices[i].toolCalls[j].Function.Arguments = arguments[i][j].String()
		}
	}
	return all, nil
}

func addUsage(sum *child.Usage, u child.Usage) {
	sum.PromptTokens += u.PromptTokens
	sum.CompletionTokens += u.CompletionTokens
	sum.CachedTokens += u.CachedTokens
	sum.ReasoningTokens += u.ReasoningTokens
}

func usageToWire(u *child.Usage) wire.Usage {
	return wire.Usage{
		PromptTokens: u.PromptTokens, CompletionTokens: u.CompletionTokens, TotalTokens: u.PromptTokens + u.CompletionTokens,
		PromptTokensDetails:     wire.PromptTokensDetails{CachedTokens: u.CachedTokens},
		CompletionTokensDetails: wire.CompletionTokensDetails{ReasoningTokens: u.ReasoningTokens},
	}
}

const minusInfinity = -9999 // JSON has no infinity; OpenAI writes this

func logProb(p float64) float64 {
	if math.IsNaN(p) || p < minusInfinity {
		return minusInfinity
	}
	return p
}

// byteList is a token's bytes as numbers: encoding/json would write base64.
func byteList(token child.TokenLogProb) []int {
	list := make([]int, len(token.Bytes))
	for i, b := range token.Bytes {
		list[i] = int(b)
	}
	return list
}

// chatLogProbs is nil for no tokens, which is written as null.
func chatLogProbs(tokens []child.TokenLogProb) *wire.LogProbs {
	if len(tokens) == 0 {
		return nil
	}
	all := &wire.LogProbs{Content: make([]wire.TokenLogProb, len(tokens))}
	for i, token := range tokens {
		top := make([]wire.TopLogProb, len(token.Top))
		for j, other := range token.Top {
			top[j] = wire.TopLogProb{Token: other.Token, LogProb: logProb(other.LogProb), Bytes: byteList(other)}
		}
		all.Content[i] = wire.TokenLogProb{Token: token.Token, LogProb: logProb(token.LogProb), Bytes: byteList(token), TopLogProbs: top}
	}
	return all
}
