// Package prompt turns messages into tokens: the model's chat template renders them to text, the model's tokenizer
// makes tokens of the text. The runner and the trainer both build prompts here and nowhere else, so that what a model
// is trained on is what it is asked.
//
//	builder, err := prompt.Open(modelDir, model.ChatTemplate(), model) // model is a *llama.Model
//	defer builder.Close()
//	tokens, err := builder.Prompt(ctx, messages)                       // the runner: up to the model's turn
//	tokens, weights, err := builder.Row(ctx, messages)                 // the trainer: with the model's turns
//
// # Templates
//
// A template is a program that came with a downloaded model. It is rendered in the runner's or trainer's process only,
// by a copy of ardanlabs/jinja (third_party/jinja) with limits on time, steps, memory and output; it cannot read files.
// It sees what transformers' apply_chat_template gives it: messages, add_generation_prompt, tools (none), bos_token,
// eos_token, raise_exception and strftime_now, with trim_blocks and lstrip_blocks on.
//
// # Special tokens in messages
//
// The whole rendered text is tokenized with special tokens parsed, as transformers and the servers built on it do.
// So a message that holds the text <|im_end|> ends its turn there. Whoever puts untrusted text into messages must
// remove such names first.
//
// # Thinking
//
// Some templates open a <think> block in the generation prompt, others write an empty one into an answer without
// reasoning. In a training row, an answer without reasoning then begins with an empty block, which is trained, and
// AnswerPrompt ends after the same empty block, for completions that are constrained to a choice.
package prompt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
	"github.com/hone-llm/hone/third_party/jinja"
)

// Vocabulary is a loaded model's own vocabulary; *llama.Model is one.
type Vocabulary interface {
	// Tokenize returns the tokens of text. addSpecial adds what the model wants around a text, usually BOS;
	// parseSpecial reads the names of special tokens in text as these tokens.
	Tokenize(text string, addSpecial, parseSpecial bool) ([]engine.Token, error)
	// Piece returns the bytes of a token, its name if it is a control token.
	Piece(engine.Token) []byte
	// IsEndOfGeneration tells whether the model ends its turn with this token.
	IsEndOfGeneration(engine.Token) bool
	// BOS and EOS return the tokens that begin and end a text, false if there is none.
	BOS() (engine.Token, bool)
	EOS() (engine.Token, bool)
	// AddBOS tells whether a plain text begins with BOS.
	AddBOS() bool
	VocabularySize() int
}

// Options of New.
type Options struct {
	Template      string           // Jinja source of the chat template; "" if the model has none
	TokenizerJSON string           // path of tokenizer.json; "" tokenizes with Vocabulary
	Vocabulary    Vocabulary       // required
	RenderTime    time.Duration    // for one rendering; 0 means 1 s
	Now           func() time.Time // what strftime_now reads; nil means time.Now
}

const (
	defaultRenderTime = time.Second
	maxTemplateBytes  = 1 << 20
)

// ErrNoTemplate is returned for messages when the model has no chat template.
var ErrNoTemplate = errors.New("the model has no chat template: " +
	"put the model's chat_template.jinja into its directory beside base.gguf, or use /v1/completions, which needs none")

// ErrNothingTrained is returned for a training row in which no assistant message has a weight other than 0.
var ErrNothingTrained = errors.New("no assistant message to train on: a row needs one whose weight is not 0")

// MessageError is a conversation that the template or the tokenizer does not take: roles out of order, text that is
// too long to render, tool arguments that are no JSON object. The request or the training row is at fault, or the
// model's template; not the server.
type MessageError struct {
	Message int // index of the message at fault, -1 for the conversation
	Err     error
}

func (e *MessageError) Error() string {
	if e.Message < 0 {
		return e.Err.Error()
	}
	return fmt.Sprintf("messages[%d]: %v", e.Message, e.Err)
}

func (e *MessageError) Unwrap() error { return e.Err }

// Builder makes prompts for one model. Goroutines may share it.
type Builder struct {
	vocabulary Vocabulary
	tokenizer  *hfTokenizer // nil: vocabulary tokenizes
	template   *jinja.Template
	digest     string
	globals    map[string]jinja.Value
	renderTime time.Duration
	// spacePrefix tells that the tokenizer puts a space before a text, as SentencePiece's do: not wanted within a turn.
	spacePrefix bool
}

// Open returns the Builder of a model directory: its chat_template.jinja if there is one, else ggufTemplate (the
// template in base.gguf's metadata), and its tokenizer.json if there is one, else the vocabulary.
func Open(modelDir, ggufTemplate string, v Vocabulary) (*Builder, error) {
	o := Options{Template: ggufTemplate, Vocabulary: v}
	path := filepath.Join(modelDir, "chat_template.jinja")
	switch text, err := readLimited(path, maxTemplateBytes); {
	case err == nil:
		o.Template = string(text)
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("read chat template: %w", err)
	}
	path = filepath.Join(modelDir, "tokenizer.json")
	switch _, err := os.Stat(path); {
	case err == nil:
		o.TokenizerJSON = path
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("read tokenizer: %w", err)
	}
	return New(o)
}

// New returns a Builder. It is an error if the template cannot be parsed, or if tokenizer.json cannot be read or does
// not belong to the vocabulary. Close it when no call is running.
func New(o Options) (*Builder, error) {
	if o.Vocabulary == nil {
		return nil, errors.New("prompt: Options.Vocabulary is required")
	}
	b := &Builder{vocabulary: o.Vocabulary, renderTime: o.RenderTime}
	if b.renderTime == 0 {
		b.renderTime = defaultRenderTime
	}
	if o.Template != "" {
		if len(o.Template) > maxTemplateBytes {
			return nil, fmt.Errorf("chat template has %d bytes, at most %d are read", len(o.Template), maxTemplateBytes)
		}
		template, err := jinja.Compile(o.Template)
		if err != nil {
			return nil, fmt.Errorf("chat template: %w", err)
		}
		b.template = template
		sum := sha256.Sum256([]byte(o.Template))
		b.digest = hex.EncodeToString(sum[:])
		b.globals = globals(o)
	}
	if o.TokenizerJSON != "" {
		tokenizer, err := openTokenizer(o.TokenizerJSON, o.Vocabulary)
		if err != nil {
			return nil, err
		}
		b.tokenizer = tokenizer
	}
	letter, err := b.tokenize("a")
	if err != nil {
		b.Close()
		return nil, err
	}
	b.spacePrefix = len(letter) > 0 && strings.HasPrefix(string(o.Vocabulary.Piece(letter[0])), " ")
	return b, nil
}

// Close frees the tokenizer. It may be called more than once.
func (b *Builder) Close() error {
	if b == nil {
		return nil
	}
	return b.tokenizer.Close()
}

// HasTemplate tells whether the model has a chat template; without one only Encode works.
func (b *Builder) HasTemplate() bool { return b.template != nil }

// TemplateDigest is the template's sha256 in hex, "" without one. An adapter's manifest records it.
func (b *Builder) TemplateDigest() string { return b.digest }

// Text renders the messages and the generation prompt: the text that the model continues with its turn.
func (b *Builder) Text(ctx context.Context, messages []wire.Message) (string, error) {
	return b.render(ctx, messages, true)
}

// Prompt returns the tokens of Text.
func (b *Builder) Prompt(ctx context.Context, messages []wire.Message) ([]engine.Token, error) {
	text, err := b.Text(ctx, messages)
	if err != nil {
		return nil, err
	}
	return b.tokenize(text)
}

// AnswerPrompt is Prompt for a completion that cannot hold reasoning, such as one of a list of choices. Where the
// template has a <think> block, the prompt goes on to the end of an empty one, exactly as in a training row whose
// answer has no reasoning; else it is Prompt's.
func (b *Builder) AnswerPrompt(ctx context.Context, messages []wire.Message) ([]engine.Token, error) {
	probe := append(slices.Clone(messages), wire.Message{Role: "assistant", Content: "x"})
	turn, err := b.turn(ctx, probe)
	if message := new(MessageError); errors.As(err, &message) {
		// The template takes no answer after these messages, or writes it in its own way: there is no block to close.
		return b.Prompt(ctx, messages)
	}
	if err != nil {
		return nil, err
	}
	tokens, err := b.tokenize(turn.prompt)
	if err != nil {
		return nil, err
	}
	think, err := b.Continuation(turn.think)
	if err != nil {
		return nil, err
	}
	return append(tokens, think...), nil
}

// Encode returns the tokens of a plain text, with BOS before it if the model wants that. Names of special tokens in
// the text are read as these tokens.
func (b *Builder) Encode(text string) ([]engine.Token, error) {
	if b.tokenizer == nil {
		tokens, err := b.vocabulary.Tokenize(text, true, true)
		if err != nil {
			return nil, fmt.Errorf("tokenize: %w", err)
		}
		return tokens, nil
	}
	tokens, err := b.tokenizer.Encode(text)
	if err != nil {
		return nil, fmt.Errorf("tokenize: %w", err)
	}
	if bos, ok := b.vocabulary.BOS(); ok && b.vocabulary.AddBOS() {
		tokens = append([]engine.Token{bos}, tokens...)
	}
	return tokens, nil
}

// tokenize returns the tokens of rendered text: the template has already written BOS where the model wants one.
func (b *Builder) tokenize(text string) ([]engine.Token, error) {
	var tokens []engine.Token
	var err error
	if b.tokenizer != nil {
		tokens, err = b.tokenizer.Encode(text)
	} else {
		tokens, err = b.vocabulary.Tokenize(text, false, true)
	}
	if err != nil {
		return nil, fmt.Errorf("tokenize the prompt: %w", err)
	}
	return tokens, nil
}

// Continuation returns the tokens of text that goes on after other tokens, such as an answer after Prompt. A training
// row spells its answers so.
func (b *Builder) Continuation(text string) ([]engine.Token, error) {
	if text == "" {
		return nil, nil
	}
	if !b.spacePrefix {
		return b.tokenize(text)
	}
	// The space that the tokenizer puts before a text is put before a newline here, and dropped with it.
	before, err := b.tokenize("\n")
	if err != nil {
		return nil, err
	}
	tokens, err := b.tokenize("\n" + text)
	if err != nil {
		return nil, err
	}
	if len(tokens) > len(before) && slices.Equal(tokens[:len(before)], before) {
		return tokens[len(before):], nil
	}
	return b.tokenize(text)
}

// Row is one training sequence.
type Row struct {
	Tokens  []engine.Token
	Weights []float32 // [len(Tokens)] loss weight of predicting each token from those before it; 0 is not trained
}

// Row returns a training row: the tokens and, for each, its loss weight. A trained turn is what the model has to say
// after Prompt of the messages before it: the answer as the template writes it, up to and with the token that ends
// the turn. The row ends with the last trained turn, and begins with exactly the tokens of Prompt for it.
//
// Some conversations take several rows (Rows says when); Row refuses them.
func (b *Builder) Row(ctx context.Context, messages []wire.Message) ([]engine.Token, []float32, error) {
	rows, err := b.Rows(ctx, messages)
	if err != nil {
		return nil, nil, err
	}
	if len(rows) != 1 {
		return nil, nil, &MessageError{Message: -1, Err: fmt.Errorf("the chat template writes earlier answers differently from how they are asked for, "+
			"so this conversation takes %d rows: set weight 0 on all assistant messages but one, or make rows of the turns", len(rows))}
	}
	return rows[0].Tokens, rows[0].Weights, nil
}

// Rows returns as few training rows as a conversation takes. That is one where every trained turn stands in the
// prompt of the next as the model had to say it. A template that drops the reasoning of earlier turns, or an answer
// that begins with white space that the tokenizer joins to the generation prompt, makes a row of its own for the turn.
// Rows of one conversation share prefixes; they come in the order of their last turns.
func (b *Builder) Rows(ctx context.Context, messages []wire.Message) ([]Row, error) {
	var rows []Row
	for i := len(messages) - 1; i >= 0; i-- {
		m := &messages[i]
		if m.Role != "assistant" || m.Weight != nil && *m.Weight == 0 {
			continue
		}
		weight := float32(1)
		if m.Weight != nil {
			weight = float32(*m.Weight)
		}
		tokens, start, err := b.turnTokens(ctx, messages[:i+1])
		if err != nil {
			return nil, err
		}
		in := slices.IndexFunc(rows, func(r Row) bool {
			return len(r.Tokens) >= len(tokens) && slices.Equal(r.Tokens[:len(tokens)], tokens)
		})
		if in < 0 {
			in = len(rows)
			rows = append(rows, Row{Tokens: tokens, Weights: make([]float32, len(tokens))})
		}
		for t := start; t < len(tokens); t++ {
			rows[in].Weights[t] = weight
		}
	}
	if len(rows) == 0 {
		return nil, &MessageError{Message: -1, Err: ErrNothingTrained}
	}
	slices.Reverse(rows)
	return rows, nil
}

// turnTokens returns the tokens up to the end of the last message's turn, and where that turn starts in them.
func (b *Builder) turnTokens(ctx context.Context, messages []wire.Message) (tokens []engine.Token, start int, err error) {
	last := len(messages) - 1
	turn, err := b.turn(ctx, messages)
	if err != nil {
		return nil, 0, err
	}
	tokens, err = b.tokenize(turn.prompt)
	if err != nil {
		return nil, 0, &MessageError{Message: last, Err: err}
	}
	start = len(tokens)
	for _, text := range []string{turn.think, turn.answer} {
		part, err := b.Continuation(text)
		if err != nil {
			return nil, 0, &MessageError{Message: last, Err: err}
		}
		tokens = append(tokens, part...)
	}
	end := len(tokens)
	for end > start && !b.vocabulary.IsEndOfGeneration(tokens[end-1]) {
		end--
	}
	if end == start {
		return nil, 0, &MessageError{Message: last, Err: fmt.Errorf("the chat template ends the assistant's turn with %q, which is no token that ends generation: "+
			"a model trained on it would never stop. Give the model directory a chat_template.jinja that writes eos_token there", tail(turn.answer, 40))}
	}
	return tokens[:end], start, nil
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
func (b *Builder) turn(ctx context.Context, messages []wire.Message) (turn, error) {
	last := len(messages) - 1
	prompt, err := b.render(ctx, messages[:last], true)
	if err != nil {
		return turn{}, err
	}
	whole, err := b.render(ctx, messages, false)
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
			return closeThink(prompt, prompt[open:], rest, messages[last].Content, last)
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

// readLimited reads a file of at most limit bytes.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, nil
}
