package server

import (
	"maps"
	"math"
	"slices"
	"strconv"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

// Bounds of a request's sampling fields.
const (
	maxCompletions       = 8 // n
	maxTemperature       = 2
	maxPenalty           = 2
	maxRepetitionPenalty = 10
	maxBias              = 100
	maxBiases            = 1024
	maxStops             = 4
	maxStopBytes         = 1024
	maxTopLogProbs       = 20
	maxTokenID           = math.MaxInt32
)

// number is a field that must lie in [low, high].
type number struct {
	name      string
	value     *float64
	low, high float64
	into      *float64
}

// applySampling checks the fields that chat and plain completions share, but for the constraints, and writes them into req.
func applySampling(f *wire.Sampling, req *child.GenerateRequest) error {
	req.Seed = f.Seed
	req.Temperature, req.TopP = 1, 1 // OpenAI's defaults
	for _, n := range []number{
		{"temperature", f.Temperature, 0, maxTemperature, &req.Temperature},
		{"top_p", f.TopP, 0, 1, &req.TopP},
		{"min_p", f.MinP, 0, 1, &req.MinP},
		{"presence_penalty", f.PresencePenalty, -maxPenalty, maxPenalty, &req.PresencePenalty},
		{"frequency_penalty", f.FrequencyPenalty, -maxPenalty, maxPenalty, &req.FrequencyPenalty},
	} {
		if n.value == nil {
			continue
		}
		if *n.value < n.low || *n.value > n.high {
			return invalid(n.name, "%s is %v, expected %v to %v", n.name, *n.value, n.low, n.high)
		}
		*n.into = *n.value
	}
	if req.TopP == 0 { // keeps the likeliest token alone
		req.TopP, req.Temperature = 1, 0
	}
	if f.RepetitionPenalty != nil {
		req.RepetitionPenalty = *f.RepetitionPenalty
		if req.RepetitionPenalty <= 0 || req.RepetitionPenalty > maxRepetitionPenalty {
			return invalid("repetition_penalty", "repetition_penalty is %v, expected more than 0 and at most %d; 1 changes nothing", req.RepetitionPenalty, maxRepetitionPenalty)
		}
	}
	if f.TopK != nil {
		if *f.TopK < -1 {
			return invalid("top_k", "top_k is %d, expected at least 1, or 0 or -1 for all tokens", *f.TopK)
		}
		req.TopK = max(*f.TopK, 0)
	}
	if f.N != nil {
		if *f.N < 1 || *f.N > maxCompletions {
			return invalid("n", "n is %d, expected 1 to %d", *f.N, maxCompletions)
		}
		if *f.N > 1 {
			req.N = *f.N
		}
	}
	if f.MinTokens != nil {
		req.MinTokens = *f.MinTokens
		switch {
		case req.MinTokens < 0:
			return invalid("min_tokens", "min_tokens is %d, expected at least 0", req.MinTokens)
		case req.MaxTokens > 0 && req.MinTokens > req.MaxTokens:
			return invalid("min_tokens", "min_tokens is %d, more than the %d tokens that the completion may have", req.MinTokens, req.MaxTokens)
		}
	}
	req.IgnoreEOS = f.IgnoreEOS != nil && *f.IgnoreEOS
	if len(f.Stop) > maxStops {
		return invalid("stop", "stop has %d strings, expected at most %d", len(f.Stop), maxStops)
	}
	for _, stop := range f.Stop {
		if stop == "" || len(stop) > maxStopBytes {
			return invalid("stop", "a stop string has %d bytes, expected 1 to %d", len(stop), maxStopBytes)
		}
	}
	req.Stop = f.Stop
	if f.StreamOptions != nil && !streamed(f) {
		return invalid("stream_options", "stream_options needs stream: true")
	}
	return applyBias(f.LogitBias, req)
}

func applyBias(biases map[string]float64, req *child.GenerateRequest) error {
	if len(biases) > maxBiases {
		return invalid("logit_bias", "logit_bias has %d tokens, expected at most %d", len(biases), maxBiases)
	}
	for _, key := range slices.Sorted(maps.Keys(biases)) {
		id, err := strconv.ParseInt(key, 10, 64)
		if err != nil || id < 0 || id > maxTokenID {
			return invalid("logit_bias", "logit_bias has the key %.40q, expected the id of a token; POST /tokenize tells it", key)
		}
		bias := biases[key]
		if bias < -maxBias || bias > maxBias {
			return invalid("logit_bias", "logit_bias of token %s is %v, expected %d to %d", key, bias, -maxBias, maxBias)
		}
		if req.LogitBias == nil {
			req.LogitBias = make(map[engine.Token]float64, len(biases))
		}
		req.LogitBias[engine.Token(id)] = bias
	}
	return nil
}

func streamed(f *wire.Sampling) bool { return f.Stream != nil && *f.Stream }
