package prompt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

// ErrNothingTrained is returned for a training row in which no assistant message has a weight other than 0.
var ErrNothingTrained = errors.New("no assistant message to train on: a row needs one whose weight is not 0")

// Row is one training sequence.
type Row struct {
	Tokens  []engine.Token
	Weights []float32 // [len(Tokens)] loss weight of predicting each token from those before it; 0 is not trained
}

// trained is a row whose tokens from start on have weight 1. The first token of a row follows from nothing and is not
// trained.
func trained(tokens []engine.Token, start int) Row {
	r := Row{tokens, make([]float32, len(tokens))}
	for i := max(start, 1); i < len(tokens); i++ {
		r.Weights[i] = 1
	}
	return r
}

// Rows returns the training rows of a conversation: as few as it takes. A trained turn is what the model has to say
// after Prompt of the messages before it: the answer as the template writes it, up to and with the token that ends
// the turn. A row ends with a trained turn, and begins with exactly the tokens of Prompt for it.
//
// One row is enough where every trained turn stands in the prompt of the next as the model had to say it. A template
// that drops the reasoning of earlier turns, or an answer that begins with white space that the tokenizer joins to the
// generation prompt, makes a row of its own for the turn. Rows of one conversation share prefixes; they come in the
// order of their last turns.
func (b *Builder) Rows(ctx context.Context, chat Chat) ([]Row, error) {
	if err := b.checkTools(ctx, chat); err != nil {
		return nil, err
	}
	var rows []Row
	for i := len(chat.Messages) - 1; i >= 0; i-- {
		m := &chat.Messages[i]
		if m.Role != "assistant" || m.Weight != nil && *m.Weight == 0 {
			continue
		}
		weight := float32(1)
		if m.Weight != nil {
			weight = float32(*m.Weight)
		}
		turn, err := b.turnTokens(ctx, Chat{chat.Messages[:i+1], chat.Tools})
		if err != nil {
			return nil, err
		}
		tokens := turn.tokens
		in := slices.IndexFunc(rows, func(r Row) bool {
			return len(r.Tokens) >= len(tokens) && slices.Equal(r.Tokens[:len(tokens)], tokens)
		})
		if in < 0 {
			in = len(rows)
			rows = append(rows, Row{Tokens: tokens, Weights: make([]float32, len(tokens))})
		}
		for t := max(turn.start, 1); t < len(tokens); t++ {
			rows[in].Weights[t] = weight
		}
	}
	if len(rows) == 0 {
		return nil, &MessageError{Message: -1, Err: ErrNothingTrained}
	}
	slices.Reverse(rows)
	return rows, nil
}

// Answers returns one row for each of several answers to the same conversation, its whole turn trained. All begin
// with the same tokens: Prompt of the conversation.
func (b *Builder) Answers(ctx context.Context, chat Chat, answers ...wire.Message) ([]Row, error) {
	var rows []Row
	for _, answer := range answers {
		whole := chat.with(answer)
		if err := b.checkTools(ctx, whole); err != nil {
			return nil, err
		}
		turn, err := b.turnTokens(ctx, whole)
		if err != nil {
			return nil, err
		}
		rows = append(rows, trained(turn.tokens, turn.start))
	}
	return rows, nil
}

// Choices returns one row for each text that the model may choose as its answer to the conversation: AnswerPrompt's
// tokens, then those of the text, which alone are trained. The rows end there, unless one choice begins with another:
// then only the token that ends the turn tells these apart, and the rows go on to it and train it.
func (b *Builder) Choices(ctx context.Context, chat Chat, choices []string) ([]Row, error) {
	if err := b.checkTools(ctx, chat); err != nil {
		return nil, err
	}
	spelled, nested, err := b.spell(choices)
	if err != nil {
		return nil, err
	}
	var rows []Row
	if nested {
		for _, choice := range choices {
			turn, err := b.turnTokens(ctx, chat.with(wire.Message{Role: "assistant", Content: choice}))
			if err != nil {
				return nil, err
			}
			rows = append(rows, trained(turn.tokens, turn.answer))
		}
		return rows, nil
	}
	before, err := b.answerPrompt(ctx, chat)
	if err != nil {
		return nil, err
	}
	for _, s := range spelled {
		rows = append(rows, trained(slices.Concat(before, s), len(before)))
	}
	return rows, nil
}

// spell returns the tokens of texts that go on after others, and whether those of one begin with those of another.
func (b *Builder) spell(texts []string) (spelled [][]engine.Token, nested bool, err error) {
	for _, text := range texts {
		tokens, err := b.Continuation(text)
		if err != nil {
			return nil, false, err
		}
		for _, other := range spelled {
			n := min(len(other), len(tokens))
			nested = nested || slices.Equal(other[:n], tokens[:n])
		}
		spelled = append(spelled, tokens)
	}
	return spelled, nested, nil
}

// Completions returns one row for each of several texts that may follow a plain prompt, without a template: Encode's
// tokens of the prompt, then those of the text and EOS, which are trained. The prompt may be empty.
func (b *Builder) Completions(prompt string, completions ...string) ([]Row, error) {
	eos, err := b.eos()
	if err != nil {
		return nil, err
	}
	var rows []Row
	for _, completion := range completions {
		tokens, start, err := b.continued(prompt, completion)
		if err != nil {
			return nil, err
		}
		if len(tokens) == start || tokens[len(tokens)-1] != eos {
			tokens = append(tokens, eos)
		}
		rows = append(rows, trained(tokens, start))
	}
	return rows, nil
}

// CompletionChoices is Choices for texts that may follow a plain prompt; lead, white space, stands between the two.
func (b *Builder) CompletionChoices(prompt, lead string, choices []string) ([]Row, error) {
	texts := make([]string, len(choices))
	for i, choice := range choices {
		texts[i] = lead + choice
	}
	_, nested, err := b.spell(texts)
	if err != nil {
		return nil, err
	}
	if nested {
		return b.Completions(prompt, texts...)
	}
	var rows []Row
	for _, text := range texts {
		tokens, start, err := b.continued(prompt, text)
		if err != nil {
			return nil, err
		}
		rows = append(rows, trained(tokens, start))
	}
	return rows, nil
}

// PlainText returns the row of a plain text: Encode's tokens and EOS, all trained but the first.
func (b *Builder) PlainText(text string) (Row, error) {
	rows, err := b.Completions("", text)
	if err != nil {
		return Row{}, err
	}
	return rows[0], nil
}

// continued returns the tokens of a plain text that continues another, and where it begins.
func (b *Builder) continued(before, text string) (tokens []engine.Token, start int, err error) {
	if tokens, err = b.Encode(before); err != nil {
		return nil, 0, err
	}
	start = len(tokens)
	if before == "" { // text begins the row: the space that some tokenizers put before a text belongs there
		tokens, err = b.Encode(text)
		return tokens, start, err
	}
	more, err := b.Continuation(text)
	return append(tokens, more...), start, err
}

func (b *Builder) eos() (engine.Token, error) {
	eos, ok := b.vocabulary.EOS()
	if !ok {
		return 0, errors.New("the model's vocabulary has no token that ends a text (EOS), so a row without a chat template has no end")
	}
	return eos, nil
}

// BOS returns the token that begins every text, false if there is none.
func (b *Builder) BOS() (engine.Token, bool) { return b.vocabulary.BOS() }

// Digest names everything that decides which tokens a row becomes: the template, and the tokenizer or the vocabulary.
func (b *Builder) Digest() (string, error) { return b.identity() }

func (b *Builder) computeDigest() (string, error) {
	hash := sha256.New()
	fmt.Fprintf(hash, "template %s\n", b.digest)
	if b.tokenizer != nil {
		fmt.Fprintf(hash, "tokenizer %x\n", b.tokenizer.digest)
	}
	v := b.vocabulary
	bos, hasBOS := v.BOS()
	eos, hasEOS := v.EOS()
	fmt.Fprintf(hash, "%d %v %d %v %v %d\n", bos, hasBOS, eos, hasEOS, v.AddBOS(), v.VocabularySize())
	for i := range v.VocabularySize() {
		t := engine.Token(i)
		fmt.Fprintf(hash, "%q %v\n", v.Piece(t), v.IsEndOfGeneration(t))
	}
	// How the pieces are put together is not to be asked for: two texts show it.
	for _, text := range []string{probe, " don't 1234567 a  b\r\n\n<|im_end|>"} {
		tokens, err := b.Encode(text)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(hash, tokens)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// turnTokens are the tokens of a conversation up to the end of its last message's turn, an assistant's.
type turnTokens struct {
	tokens []engine.Token
	start  int // of the turn
	answer int // where the answer itself begins: behind an empty <think> block
}

func (b *Builder) turnTokens(ctx context.Context, chat Chat) (turnTokens, error) {
	last := len(chat.Messages) - 1
	turn, err := b.turn(ctx, chat, nil)
	if err != nil {
		return turnTokens{}, err
	}
	var r turnTokens
	if r.tokens, err = b.tokenize(turn.prompt); err != nil {
		return r, &MessageError{Message: last, Err: err}
	}
	r.start = len(r.tokens)
	for _, text := range []string{turn.think, turn.answer} {
		r.answer = len(r.tokens)
		part, err := b.Continuation(text)
		if err != nil {
			return r, &MessageError{Message: last, Err: err}
		}
		r.tokens = append(r.tokens, part...)
	}
	end := len(r.tokens)
	for end > r.start && !b.vocabulary.IsEndOfGeneration(r.tokens[end-1]) {
		end--
	}
	if end == r.start {
		return r, &MessageError{Message: last, Err: fmt.Errorf("the chat template ends the assistant's turn with %q, which is no token that ends generation: "+
			"a model trained on it would never stop. Give the model directory a chat_template.jinja that writes eos_token there", tail(turn.answer, 40))}
	}
	r.tokens = r.tokens[:end]
	return r, nil
}

// turn is how a template writes an assistant's message after the messages before it.
type turn struct {
	prompt string // Text of the messages before
	think  string // an empty <think> block, or its end where prompt opens it; "" if there is none
	answer string // the rest of the turn, and what the template writes between it and the next
}

// emptyThink matches the end of an empty <think> block, with its beginning unless the generation prompt has it.
var emptyThink = regexp.MustCompile(`^(?:<think>)?\n*</think>\n{0,2}`)

// turn renders the last message, an assistant's, as the model has to say it.
func (b *Builder) turn(ctx context.Context, chat Chat, vars variables) (turn, error) {
	last := len(chat.Messages) - 1
	prompt, err := b.render(ctx, Chat{chat.Messages[:last], chat.Tools}, true, vars)
	if err != nil {
		return turn{}, err
	}
	whole, err := b.render(ctx, chat, false, vars)
	if err != nil {
		return turn{}, err
	}
	if rest, ok := strings.CutPrefix(whole, prompt); ok {
		think := emptyThink.FindString(rest)
		return turn{prompt: prompt, think: think, answer: rest[len(think):]}, nil
	}

	// The generation prompt opens a <think> block that the template does not write into finished turns.
	if open := strings.LastIndex(prompt, "<think>"); open >= 0 && strings.TrimSpace(prompt[open:]) == "<think>" {
		if rest, ok := strings.CutPrefix(whole, prompt[:open]); ok {
			return closeThink(prompt, prompt[open:], rest, chat.Messages[last].Content, last)
		}
	}
	return turn{}, &MessageError{Message: last, Err: fmt.Errorf("the chat template writes the assistant's turn differently from its generation prompt: "+
		"it asks for an answer after %q and writes one as %q", tail(prompt, 60), tail(whole, 60))}
}

// closeThink makes the turn of an answer after a generation prompt that ends with open, "<think>" and white space;
// rest is how the template writes the finished turn without a block, content is the message's.
func closeThink(prompt, open, rest, content string, index int) (turn, error) {
	newline := ""
	if !strings.HasSuffix(open, "\n") {
		newline = "\n"
	}
	reasoning, answer, found := cutLast(content, "</think>")
	if !found {
		return turn{prompt: prompt, think: newline + "\n</think>\n\n", answer: rest}, nil
	}
	// The template has dropped the reasoning; what it wrote after the answer ends the turn.
	answer = strings.TrimSpace(answer)
	at := strings.LastIndex(rest, answer)
	if answer == "" || at < 0 {
		return turn{}, &MessageError{Message: index, Err: fmt.Errorf("no answer after </think> that the chat template keeps: it writes %q", tail(rest, 60))}
	}
	answer = rest[at:]
	reasoning = strings.TrimPrefix(strings.TrimLeft(reasoning, "\n"), "<think>")
	reasoning = strings.Trim(reasoning, "\n")
	if reasoning == "" {
		return turn{prompt: prompt, think: newline + "\n</think>\n\n", answer: answer}, nil
	}
	return turn{prompt: prompt, answer: newline + reasoning + "\n</think>\n\n" + answer}, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// tail returns the end of s for an error message, at most n bytes and whole characters.
func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "..." + strings.ToValidUTF8(s[len(s)-n:], "")
}
