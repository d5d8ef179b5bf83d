// Package prompt turns messages into tokens: the model's chat template renders them to text, the model's tokenizer
// makes tokens of the text. The runner and the trainer both build prompts here and nowhere else, so that what a model
// is trained on is what it is asked.
//
//	builder, err := prompt.Open(modelDir, model.ChatTemplate(), model) // model is a *llama.Model
//	defer builder.Close()
//	chat, err := builder.ChatPrompt(ctx, messages, options)            // the runner: up to the model's turn
//	rows, err := builder.Rows(ctx, prompt.Chat{Messages: messages})    // the trainer: with the model's turns
//
// # Templates
//
// A template is a program that came with a downloaded model. It is rendered in the runner's or trainer's process only,
// by a copy of ardanlabs/jinja (third_party/jinja) with limits on time, steps, memory and output; it cannot read files.
// It sees what transformers' apply_chat_template gives it: messages, add_generation_prompt, tools, bos_token,
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
// a completion that is constrained (to a choice, a schema, a grammar, a call) comes after the same empty block: the
// constraint is of the whole completion, so there is no room for reasoning. ChatPrompt says by its Parser whether
// a free completion begins with reasoning; what a template does is found by rendering small conversations.
//
// # Tools
//
// Definitions, calls and results are the template's to write. Two forms of calls are read: Hermes' (<tool_call>, also
// Qwen's) and Llama 3's. For a template with another form or none, the messages state tools in Hermes' form, so that
// every chat model can be asked for a call; a training row is refused instead (Rows), for the model could not learn from it
// what it is not told when it is served by others. Calls are kept to their functions' schemas by ChatPrompt.Constraint,
// read by ChatPrompt.NewParser.
package prompt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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
	"put the model's chat_template.jinja into its directory beside base.gguf, or do without: " +
	`/v1/completions and training rows {"prompt": ..., "completion": ...} need none`)

// MessageError is a conversation that the template or the tokenizer does not take: roles out of order, text that is
// too long to render, tool arguments that are no JSON object. The request or the training row is at fault, or the
// model's template; not the server.
type MessageError struct {
	Message int    // index of the message at fault, -1 for the conversation
	Param   string // the part of the request at fault: tools, tool_choice; "" for messages
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
	tools       func() toolSupport // of the template, probed at the first call
	thinking    func() thinking    // the same
	identity    func() (string, error)
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
	b.tools = sync.OnceValue(b.probeTools)
	b.thinking = sync.OnceValue(b.probeThinking)
	b.identity = sync.OnceValues(b.computeDigest)
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

// Chat is a conversation and the tools that its assistant may call.
type Chat struct {
	Messages []wire.Message
	Tools    json.RawMessage // OpenAI's array of {"type": "function", "function": {...}}; nil, null and [] mean none
}

// with returns the conversation with one more message.
func (c Chat) with(m wire.Message) Chat {
	return Chat{append(slices.Clip(c.Messages), m), c.Tools}
}

// Text renders the messages and the generation prompt: the text that the model continues with its turn.
func (b *Builder) Text(ctx context.Context, messages []wire.Message) (string, error) {
	return b.render(ctx, Chat{Messages: messages}, true, nil)
}

// Prompt returns the tokens of Text.
func (b *Builder) Prompt(ctx context.Context, messages []wire.Message) ([]engine.Token, error) {
	return b.prompt(ctx, Chat{Messages: messages})
}

func (b *Builder) prompt(ctx context.Context, chat Chat) ([]engine.Token, error) {
	text, err := b.render(ctx, chat, true, nil)
	if err != nil {
		return nil, err
	}
	return b.tokenize(text)
}

// AnswerPrompt is Prompt for a completion that cannot hold reasoning, such as one of a list of choices. Where the
// template has a <think> block, the prompt goes on to the end of an empty one, exactly as in a training row whose
// answer has no reasoning; else it is Prompt's.
func (b *Builder) AnswerPrompt(ctx context.Context, messages []wire.Message) ([]engine.Token, error) {
	return b.answerPrompt(ctx, Chat{Messages: messages})
}

func (b *Builder) answerPrompt(ctx context.Context, chat Chat) ([]engine.Token, error) {
	text, think, err := b.answerText(ctx, chat, nil)
	if err != nil {
		return nil, err
	}
	return b.joined(text, think)
}

// answerText is the text of an answerPrompt, up to the empty block, and the block, "" if there is none.
func (b *Builder) answerText(ctx context.Context, chat Chat, vars variables) (text, think string, err error) {
	turn, err := b.turn(ctx, chat.with(wire.Message{Role: "assistant", Content: "x"}), vars)
	if message := new(MessageError); errors.As(err, &message) {
		// The template takes no answer after these messages, or writes it in its own way: there is no block to close.
		text, err = b.render(ctx, chat, true, vars)
		return text, "", err
	}
	return turn.prompt, turn.think, err
}

// joined returns the tokens of rendered text and of what continues it.
func (b *Builder) joined(text, more string) ([]engine.Token, error) {
	tokens, err := b.tokenize(text)
	if err != nil {
		return nil, err
	}
	rest, err := b.Continuation(more)
	if err != nil {
		return nil, err
	}
	return append(tokens, rest...), nil
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
