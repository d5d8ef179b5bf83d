package client

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	openai "github.com/sashabaranov/go-openai"
	"golang.org/x/sync/errgroup"
)

// PredictorOptions says how questions are asked. Only Model is required.
type PredictorOptions struct {
	Model string
	// Template words a question, see CheckTemplate. "" takes the one that the model was tuned with, else DefaultTemplate.
	Template string
	// Concurrency is how many questions are in flight; 0 means 8.
	Concurrency int
	// RetryFor bounds how long one question is asked again while the server is away or busy; 0 means one minute.
	RetryFor time.Duration
}

// Predictor answers multiple-choice questions with one model. Goroutines may share it.
type Predictor struct {
	client  *Client
	options PredictorOptions
	model   Model
	// Warning is set if the template differs from the one that the model was tuned with: its answers will be worse.
	Warning string
}

// Prediction is the model's answer to a question.
type Prediction struct {
	Question Question
	Answer   string // A, B, C or D; "" if Err is set
	// Probabilities of A, B, C and D: the model's own, over the four. Zero if the server sent no log-probabilities.
	Probabilities [4]float64
	Confidence    float64 // the probability of Answer
	PromptTokens  int
	CachedTokens  int // of the prompt tokens, those that needed no computation
	// Err says why this question has no answer, as the prompt was too long; other errors end the run.
	Err error
}

// NewPredictor looks the model up and decides the template.
func (c *Client) NewPredictor(ctx context.Context, options PredictorOptions) (*Predictor, error) {
	if options.Concurrency < 0 {
		return nil, fmt.Errorf("concurrency is %d, expected at least 1", options.Concurrency)
	}
	if options.Concurrency == 0 {
		options.Concurrency = 8
	}
	if options.RetryFor <= 0 {
		options.RetryFor = time.Minute
	}
	p := &Predictor{client: c, options: options}
	err := p.retry(ctx, func() (err error) {
		p.model, err = c.Model(ctx, options.Model)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("model %q: %w", options.Model, err)
	}
	tuned := ""
	if p.model.Hone != nil && p.model.Hone.QuestionTemplate != nil {
		tuned = *p.model.Hone.QuestionTemplate
	}
	switch {
	case options.Template == "" && tuned != "":
		p.options.Template = tuned
	case options.Template == "":
		p.options.Template = DefaultTemplate
	case tuned != "" && options.Template != tuned:
		p.Warning = fmt.Sprintf("model %q was tuned with another question template, %q: expect worse answers", options.Model, tuned)
	}
	if err := CheckTemplate(p.options.Template); err != nil {
		return nil, err
	}
	return p, nil
}

// Template is the template in use.
func (p *Predictor) Template() string { return p.options.Template }

// Model is the model in use.
func (p *Predictor) Model() Model { return p.model }

// Predict answers one question. The error is for what the next question would meet too; what is wrong with this question
// alone is in Prediction.Err.
func (p *Predictor) Predict(ctx context.Context, q Question) (Prediction, error) {
	prediction := Prediction{Question: q}
	request := openai.ChatCompletionRequest{
		Model:    p.options.Model,
		Messages: []openai.ChatCompletionMessage{{Role: openai.ChatMessageRoleUser, Content: Word(p.options.Template, q)}},
		// No temperature: a constrained choice is then the likeliest one. A letter may be two tokens, hence the 8.
		MaxCompletionTokens: 8,
		LogProbs:            true,
		TopLogProbs:         len(Choices),
		ChatCompletionRequestExtensions: openai.ChatCompletionRequestExtensions{
			GuidedChoice: Choices,
		},
	}
	var response openai.ChatCompletionResponse
	var chosen [][]ChoiceProbability
	err := p.retry(ctx, func() (err error) {
		response, chosen, err = p.client.Choose(ctx, request)
		return err
	})
	var api *APIError
	switch {
	case errors.As(err, &api) && api.Code == "context_length_exceeded":
		prediction.Err = err
		return prediction, nil
	case err != nil:
		return prediction, fmt.Errorf("question %s: %w", q.ID, err)
	case len(response.Choices) != 1:
		return prediction, fmt.Errorf("question %s: the server sent %d choices, expected 1", q.ID, len(response.Choices))
	}
	choice := response.Choices[0]
	at := slices.Index(Choices, choice.Message.Content)
	if at < 0 {
		// Taking a letter out of the text, or falling back to one, would hide what the model did.
		return prediction, fmt.Errorf("question %s: the answer %.40q is none of A, B, C and D: the server does not honour guided_choice", q.ID, choice.Message.Content)
	}
	prediction.Answer = Choices[at]
	prediction.PromptTokens = response.Usage.PromptTokens
	if details := response.Usage.PromptTokensDetails; details != nil {
		prediction.CachedTokens = details.CachedTokens
	}
	switch {
	case len(chosen) == 1 && len(chosen[0]) == len(Choices):
		for _, c := range chosen[0] {
			if i := slices.Index(Choices, c.Choice); i >= 0 {
				prediction.Probabilities[i] = c.Probability
			}
		}
		prediction.Confidence = prediction.Probabilities[at]
	case choice.LogProbs != nil: // another server's
		prediction.Probabilities = probabilities(choice.LogProbs.Content)
		prediction.Confidence = prediction.Probabilities[at]
	}
	return prediction, nil
}

// probabilities reads the four choices' from the first token's alternatives and renormalises them.
func probabilities(tokens []openai.LogProb) [4]float64 {
	var p [4]float64
	if len(tokens) == 0 {
		return p
	}
	seen := append([]openai.TopLogProbs{{Token: tokens[0].Token, LogProb: tokens[0].LogProb}}, tokens[0].TopLogProbs...)
	sum := 0.0
	for _, t := range seen {
		if i := slices.Index(Choices, strings.TrimSpace(t.Token)); i >= 0 && p[i] == 0 {
			p[i] = math.Exp(t.LogProb)
			sum += p[i]
		}
	}
	if sum > 0 {
		for i := range p {
			p[i] /= sum
		}
	}
	return p
}

// Run answers the questions, several at a time, and calls emit with the predictions in the questions' order, each as soon
// as it and those before it are there. It ends at the first error, also emit's, after which nothing is in flight.
func (p *Predictor) Run(ctx context.Context, questions []Question, emit func(Prediction) error) error {
	group, ctx := errgroup.WithContext(ctx)
	// One channel a question, read in order. A worker takes a slot before its question and gives it back after, so at
	// most Concurrency are in flight; emit is fast, so answers do not pile up.
	slots := make(chan struct{}, p.options.Concurrency)
	pending := make(chan chan Prediction, 4*p.options.Concurrency)
	group.Go(func() error {
		defer close(pending)
		for _, q := range questions {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			result := make(chan Prediction, 1)
			select {
			case pending <- result:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			group.Go(func() error {
				prediction, err := p.Predict(ctx, q)
				if err != nil {
					return err // and keep the slot: no further question is to meet the same error first
				}
				result <- prediction
				<-slots
				return nil
			})
		}
		return nil
	})
	group.Go(func() error {
		for result := range pending {
			select {
			case prediction := <-result:
				if err := emit(prediction); err != nil {
					return err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	return group.Wait()
}

// retry calls do again while it fails for want of a server, waiting twice as long each time, up to 4 s. While the model is
// loading, it waits as long as the server does.
func (p *Predictor) retry(ctx context.Context, do func() error) error {
	wait, end := 100*time.Millisecond, time.Now().Add(p.options.RetryFor)
	for {
		err := do()
		if api, ok := errors.AsType[*APIError](err); ok && api.Code == "model_loading" {
			end = time.Now().Add(p.options.RetryFor)
		}
		if err == nil || ctx.Err() != nil || !retryable(err) || time.Now().Add(wait).After(end) {
			return err
		}
		// Up to half as long again, so that the questions in flight do not all come back at once.
		if err := sleep(ctx, wait+rand.N(wait/2)); err != nil {
			return err
		}
		wait = min(2*wait, 4*time.Second)
	}
}
