package server

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Bounds of a decision, OpenAI's.
const (
	maxQuestions        = 200
	maxDecisionChoices  = 255
	minLevels           = 2
	maxLevels           = 10
	maxInstructionBytes = 64 << 10
)

// decision answers POST /v1/decisions: each question is a chat completion that is constrained to its choices, and what is
// answered are their probabilities.
//
// A question follows the input in one user message, so all questions of a request begin with the input, which the runner
// computes once.
func (s *Server) decision(c *gin.Context) error {
	var req wire.DecisionRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	input, err := decisionInput(req.Input)
	if err != nil {
		return err
	}
	if len(req.Questions) == 0 || len(req.Questions) > maxQuestions {
		return invalid("questions", "questions has %d elements, expected 1 to %d", len(req.Questions), maxQuestions)
	}
	id := newID("dec-")
	requests := make([]child.GenerateRequest, len(req.Questions))
	for i := range req.Questions {
		question := &req.Questions[i]
		if err := checkQuestion(pathOf("questions", i), question); err != nil {
			return err
		}
		requests[i] = child.GenerateRequest{
			ID: partID(id, i), Client: clientOf(c.Request), TopP: 1,
			Messages:       []wire.Message{{Role: "user", Content: wordQuestion(input, question)}},
			Constraint:     &child.Constraint{Kind: child.ConstraintChoice, Choices: decisionChoices(question)},
			EnableThinking: new(false),
		}
	}
	target, err := s.resolve(c.Request.Context(), req.Model)
	if err != nil {
		return err
	}
	defer target.release()
	answer := wire.Decision{Model: req.Model, Answers: make([]wire.DecisionAnswer, len(requests))}
	usages := make([]wire.Usage, len(requests))
	err = each(c.Request.Context(), len(requests), func(ctx context.Context, i int) error {
		requests[i].Adapter = target.adapter
		all, err := collect(whole(s.generator.Generate(ctx, target.base, requests[i]), 1), 1)
		if err != nil {
			return blameInput(err)
		}
		p := all.choices[0].choiceProbabilities
		if want := len(requests[i].Constraint.Choices); len(p) != want {
			return fmt.Errorf("the runner sent %d probabilities of %d choices", len(p), want)
		}
		answer.Answers[i], usages[i] = decide(&req.Questions[i], p), all.usage
		return nil
	})
	if err != nil {
		return err
	}
	for _, u := range usages {
		answer.Usage.InputTokens += u.PromptTokens
		answer.Usage.InputTokensDetails.CachedTokens += u.PromptTokensDetails.CachedTokens
		answer.Usage.OutputTokens += u.CompletionTokens
		answer.Usage.TotalTokens += u.TotalTokens
	}
	return encode(c, http.StatusOK, answer)
}

// decisionInput joins the input's messages.
func decisionInput(messages []wire.Message) (string, error) {
	texts := make([]string, len(messages))
	for i, m := range messages {
		if m.Role != "user" {
			path := pathOf("input", i) + ".role"
			return "", invalid(path, "%s is %q, expected user", path, m.Role)
		}
		texts[i] = m.Content
	}
	input := strings.TrimSpace(strings.Join(texts, "\n\n"))
	if input == "" {
		return "", invalid("input", "input is required: a string, or an array of messages of role user")
	}
	return input, nil
}

func checkQuestion(path string, q *wire.DecisionQuestion) error {
	if strings.TrimSpace(q.Instructions) == "" || len(q.Instructions) > maxInstructionBytes {
		return invalid(path+".instructions", "%s.instructions has %d bytes, expected 1 to %d", path, len(q.Instructions), maxInstructionBytes)
	}
	list, low, high := "choices", minChoices, maxDecisionChoices
	switch q.Type {
	case wire.DecisionPredicateType:
		return nil
	case wire.DecisionChoiceType:
	case wire.DecisionScoreType:
		list, low, high = "levels", minLevels, maxLevels
	default:
		return invalid(path+".type", "%s.type is %q, expected choice, predicate or score", path, q.Type)
	}
	path += "." + list
	values := decisionChoices(q)
	if len(values) < low || len(values) > high {
		return invalid(path, "%s has %d elements, expected %d to %d", path, len(values), low, high)
	}
	for i, value := range values {
		if strings.TrimSpace(value) == "" || len(value) > maxChoiceBytes {
			return invalid(pathOf(path, i), "%s[%d] has %d bytes, expected 1 to %d", path, i, len(value), maxChoiceBytes)
		}
		if j := slices.Index(values[:i], value); j >= 0 {
			return invalid(pathOf(path, i), "%s[%d] and [%d] are the same text, %q", path, j, i, value)
		}
	}
	return nil
}

// decisionChoices are the texts among which the model decides.
func decisionChoices(q *wire.DecisionQuestion) []string {
	var values []string
	switch q.Type {
	case wire.DecisionPredicateType:
		values = []string{"Yes", "No"}
	case wire.DecisionChoiceType:
		for _, choice := range q.Choices {
			values = append(values, choice.Value.Text)
		}
	case wire.DecisionScoreType:
		for _, level := range q.Levels {
			values = append(values, level.Label)
		}
	}
	return values
}

// wordQuestion asks a question about the input. The values themselves are the answers, not letters before them: a small
// model ranks the values better (SmolLM2-135M-Instruct, docs/api.md), and a letter would have to be learnt first.
func wordQuestion(input string, q *wire.DecisionQuestion) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Text:\n%s\n\n", input)
	if q.Type == wire.DecisionPredicateType {
		fmt.Fprintf(&b, "Statement: %s\nIs the statement true? Answer Yes or No.", q.Instructions)
		return b.String()
	}
	fmt.Fprintf(&b, "Question: %s\n", q.Instructions)
	line := func(value, description string) {
		fmt.Fprintf(&b, "- %s", value)
		if description != "" {
			fmt.Fprintf(&b, ": %s", description)
		}
		b.WriteByte('\n')
	}
	if q.Type == wire.DecisionScoreType {
		b.WriteString("Levels, from the lowest to the highest:\n")
		for _, level := range q.Levels {
			line(level.Label, level.Description)
		}
		b.WriteString("Answer with one of the levels, and nothing else.")
		return b.String()
	}
	b.WriteString("Options:\n")
	for _, choice := range q.Choices {
		line(choice.Value.Text, choice.Description)
	}
	b.WriteString("Answer with one of the options, and nothing else.")
	return b.String()
}

// decide makes the answer of the probabilities of the choices.
func decide(q *wire.DecisionQuestion, p []float64) wire.DecisionAnswer {
	best := 0
	for i := range p {
		if p[i] > p[best] {
			best = i
		}
	}
	switch q.Type {
	case wire.DecisionPredicateType:
		return wire.DecisionAnswer{Predicate: &wire.PredicateAnswer{Type: q.Type, Name: q.Name, Probability: p[0]}}
	case wire.DecisionScoreType:
		answer := &wire.ScoreAnswer{Type: q.Type, Name: q.Name, Confidence: p[best]}
		for i, level := range q.Levels {
			answer.Score += float64(i) * p[i]
			answer.Probabilities = append(answer.Probabilities, wire.LevelProbability{Value: i, Label: level.Label, Probability: p[i]})
		}
		answer.Score = math.Min(answer.Score, float64(len(p)-1)) // rounding
		return wire.DecisionAnswer{Score: answer}
	}
	answer := &wire.ChoiceAnswer{Type: q.Type, Name: q.Name, Choice: q.Choices[best].Value, Confidence: p[best]}
	for i, choice := range q.Choices {
		answer.Probabilities = append(answer.Probabilities, wire.ValueProbability{Value: choice.Value, Probability: p[i]})
	}
	return wire.DecisionAnswer{Choice: answer}
}
