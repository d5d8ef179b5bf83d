package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	openai "github.com/sashabaranov/go-openai"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/hone-llm/hone/client"
)

func newChatCommand(s streams) *cobra.Command {
	var system string
	var maxTokens int
	cmd := &cobra.Command{
		Use:   "chat MODEL",
		Short: "Talk to a model of a running server",
		Long: "On a terminal: one prompt a line, /new begins a new conversation, /bye or Ctrl-D ends. Elsewhere the whole standard\n" +
			"input is one prompt.",
		Example: "  hone chat SmolLM2-135M-Instruct\n  echo 'What is the capital of France?' | hone chat SmolLM2-135M-Instruct",
		Args:    wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			talk := &conversation{client: c, streams: s, model: args[0], maxTokens: maxTokens, system: system}
			talk.begin()
			if f, ok := s.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				return talk.interactive(cmd.Context())
			}
			prompt, err := io.ReadAll(io.LimitReader(s.in, 16<<20))
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(prompt)) == "" {
				return usageError{errors.New("chat: there is no prompt on standard input")}
			}
			return talk.ask(cmd.Context(), strings.TrimRight(string(prompt), "\r\n"))
		},
	}
	cmd.Flags().StringVar(&system, "system", "", "system message")
	cmd.Flags().IntVar(&maxTokens, "max-tokens", 0, "longest answer (default: until the context is full)")
	addServerFlags(cmd)
	return cmd
}

// conversation is a chat so far.
type conversation struct {
	client    *client.Client
	streams   streams
	model     string
	system    string
	maxTokens int
	messages  []openai.ChatCompletionMessage
}

// begin forgets what was said.
func (t *conversation) begin() {
	t.messages = nil
	if t.system != "" {
		t.messages = append(t.messages, openai.ChatCompletionMessage{Role: openai.ChatMessageRoleSystem, Content: t.system})
	}
}

// interactive reads prompts until the end of the input or of ctx. The reading goroutine may outlast it, in a read of a
// terminal that nothing can interrupt; the process ends next.
func (t *conversation) interactive(ctx context.Context) error {
	if _, err := t.client.Model(ctx, t.model); err != nil {
		return err // before the user has typed anything
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(t.streams.in)
		scanner.Buffer(nil, 16<<20)
		for scanner.Scan() {
			select {
			case lines <- scanner.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		fmt.Fprint(t.streams.out, "> ")
		var line string
		var ok bool
		select {
		case <-ctx.Done():
			fmt.Fprintln(t.streams.out)
			return context.Cause(ctx)
		case line, ok = <-lines:
		}
		if !ok {
			fmt.Fprintln(t.streams.out)
			return nil
		}
		switch strings.TrimSpace(line) {
		case "":
		case "/bye":
			return nil
		case "/new":
			t.begin()
		default:
			if err := t.ask(ctx, line); err != nil {
				if ctx.Err() != nil {
					return err
				}
				fmt.Fprintln(t.streams.err, "hone:", err)
			}
		}
	}
}

// ask sends a prompt and prints the answer as it comes. Both stay in the conversation only if the answer is whole.
func (t *conversation) ask(ctx context.Context, prompt string) error {
	messages := append(slices.Clip(t.messages), openai.ChatCompletionMessage{Role: openai.ChatMessageRoleUser, Content: prompt})
	printer := &answerPrinter{streams: t.streams, terminal: isTerminal(t.streams.out)}
	answer, reason, err := t.client.StreamChat(ctx, openai.ChatCompletionRequest{Model: t.model, Messages: messages, MaxCompletionTokens: t.maxTokens}, printer.print)
	printer.end()
	if err != nil {
		return err
	}
	if reason == openai.FinishReasonLength {
		fmt.Fprintln(t.streams.err, "(the answer was cut off: the limit of its length is reached)")
	}
	t.messages = append(messages, openai.ChatCompletionMessage{Role: openai.ChatMessageRoleAssistant, Content: answer})
	return nil
}

// answerPrinter prints an answer as it comes. Reasoning is dimmed on a terminal; elsewhere it goes to standard error, so
// that standard output is the answer alone.
type answerPrinter struct {
	streams  streams
	terminal bool
	thinking bool
}

func (p *answerPrinter) print(delta client.ChatDelta) error {
	if delta.Reasoning != "" {
		if p.terminal {
			_, err := io.WriteString(p.streams.out, dim+delta.Reasoning+undim)
			p.thinking = true
			return err
		}
		if !p.thinking {
			fmt.Fprintln(p.streams.err, "(thinking)")
		}
		p.thinking = true
		if _, err := io.WriteString(p.streams.err, delta.Reasoning); err != nil {
			return err
		}
	}
	if delta.Text == "" {
		return nil
	}
	p.endThinking()
	_, err := io.WriteString(p.streams.out, delta.Text)
	return err
}

// endThinking begins a new line for the answer.
func (p *answerPrinter) endThinking() {
	switch {
	case p.thinking && p.terminal:
		fmt.Fprint(p.streams.out, "\n\n")
	case p.thinking:
		fmt.Fprintln(p.streams.err, "\n(answer)")
	}
	p.thinking = false
}

func (p *answerPrinter) end() {
	p.endThinking()
	fmt.Fprintln(p.streams.out)
}

// ANSI's escape sequences of faint text and of its end.
const (
	dim   = "\x1b[2m"
	undim = "\x1b[22m"
)
