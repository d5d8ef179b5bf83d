package server

import (
	"context"
	"crypto/rand"
	"iter"
	"math"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Generator computes completions; child.Runners implements it. It yields text events and then one with a FinishReason,
// or an error. Breaking off the loop or ending ctx cancels the completion.
type Generator interface {
	Generate(ctx context.Context, base child.Base, req child.GenerateRequest) iter.Seq2[child.GenerateEvent, error]
}

// Bounds of a request's sampling fields.
const (
	maxTemperature  = 2
	maxStops        = 4
	maxStopBytes    = 1024
	maxTopLogProbs  = 20
	minChoices      = 2
	maxChoices      = 256
	maxChoiceBytes  = 4096
	maxMessages     = 4096
	minusInfinity   = -9999 // JSON has no infinity; OpenAI writes this
	completionLimit = 16    // max_tokens of /v1/completions when it is not sent, as OpenAI's
)

// sampling holds the fields that chat and plain completions share.
type sampling struct {
	temperature, topP *float64
	seed              *int64
	stop              []string
	choices           []string
}

// apply checks the fields and writes them into req.
func (f sampling) apply(req *child.GenerateRequest) error {
	req.Seed = f.seed
	req.Temperature, req.TopP = 1, 1 // OpenAI's defaults
	if f.temperature != nil {
		if req.Temperature = *f.temperature; req.Temperature < 0 || req.Temperature > maxTemperature {
			return invalid("temperature", "temperature is %v, expected 0 to %d", *f.temperature, maxTemperature)
		}
	}
	if f.topP != nil {
		if req.TopP = *f.topP; req.TopP < 0 || req.TopP > 1 {
			return invalid("top_p", "top_p is %v, expected 0 to 1", *f.topP)
		}
		if req.TopP == 0 { // keeps the likeliest token alone
			req.TopP, req.Temperature = 1, 0
		}
	}
	if len(f.stop) > maxStops {
		return invalid("stop", "stop has %d strings, expected at most %d", len(f.stop), maxStops)
	}
	for _, stop := range f.stop {
		if stop == "" || len(stop) > maxStopBytes {
			return invalid("stop", "a stop string has %d bytes, expected 1 to %d", len(stop), maxStopBytes)
		}
	}
	req.Stop = f.stop
	if f.choices == nil {
		return nil
	}
	if err := checkChoices(f.choices, f.stop); err != nil {
		return err
	}
	req.Constraint = &child.Constraint{Kind: child.ConstraintChoice, Choices: f.choices}
	req.Stop = nil // it is in none of the choices, so it cannot occur
	if f.temperature == nil {
		// Clients that mean 0 may be unable to send it, and the likeliest choice is what is asked for.
		req.Temperature = 0
	}
	return nil
}

func checkChoices(choices, stops []string) error {
	if len(choices) < minChoices || len(choices) > maxChoices {
		return invalid("guided_choice", "guided_choice has %d strings, expected %d to %d", len(choices), minChoices, maxChoices)
	}
	for i, choice := range choices {
		if choice == "" || len(choice) > maxChoiceBytes {
			return invalid("guided_choice", "guided_choice[%d] has %d bytes, expected 1 to %d", i, len(choice), maxChoiceBytes)
		}
		if j := slices.Index(choices[:i], choice); j >= 0 {
			return invalid("guided_choice", "guided_choice[%d] and [%d] are both %q", j, i, choice)
		}
		for _, stop := range stops {
			if strings.Contains(choice, stop) {
				return invalid("stop", "the stop string %q is part of guided_choice[%d], %q, and would cut it off", stop, i, choice)
			}
		}
	}
	return nil
}

// newID returns an id that no other completion has.
func newID(prefix string) string { return prefix + strings.ToLower(rand.Text()) }

// collected is a whole completion.
type collected struct {
	text         string
	logProbs     []child.TokenLogProb
	finishReason string
	usage        wire.Usage
}

// collect reads a completion to its end.
func collect(events iter.Seq2[child.GenerateEvent, error]) (collected, error) {
	var all collected
	var text strings.Builder
	for event, err := range events {
		if err != nil {
			return collected{}, err
		}
		text.WriteString(event.Text)
		all.logProbs = append(all.logProbs, event.LogProbs...)
		if event.FinishReason != "" {
			all.text, all.finishReason, all.usage = text.String(), event.FinishReason, usageToWire(event.Usage)
			return all, nil
		}
	}
	return collected{}, child.ErrEnded
}

func usageToWire(u *child.Usage) wire.Usage {
	if u == nil {
		return wire.Usage{}
	}
	return wire.Usage{
		PromptTokens: u.PromptTokens, CompletionTokens: u.CompletionTokens, TotalTokens: u.PromptTokens + u.CompletionTokens,
		PromptTokensDetails: wire.PromptTokensDetails{CachedTokens: u.CachedTokens},
	}
}

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
