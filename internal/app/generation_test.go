//go:build cgo

package app_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/wire"
)

// request sends a chat request whose fields beside the model are given as JSON, for the client with this key.
func (h *hone) request(ctx context.Context, key, fields string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url+"/v1/chat/completions", strings.NewReader(`{"model":"`+model+`",`+fields+`}`))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+key)
	return http.DefaultClient.Do(req)
}

// whole returns the answer to a chat request.
func (h *hone) whole(t *testing.T, fields string) wire.ChatCompletion {
	t.Helper()
	var answer wire.ChatCompletion
	h.post(t, "/v1/chat/completions", `{"model":"`+model+`",`+fields+`}`, &answer)
	return answer
}

// streamed returns the first completion of a stream, put together from its events, which must end with [DONE].
func (h *hone) streamed(t *testing.T, fields string) wire.ChatChoice {
	t.Helper()
	resp, err := h.request(t.Context(), "key", fields+`,"stream":true`)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	choice := wire.ChatChoice{Message: wire.ChatMessage{Content: new("")}}
	last := ""
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if last = data; last == "[DONE]" {
			break
		}
		var chunk wire.ChatCompletionChunk
		if err := json.Unmarshal([]byte(data), &chunk); err != nil {
			t.Fatalf("%v: %s", err, data)
		}
		for _, c := range chunk.Choices {
			if c.Delta.Content.Value != nil {
				*choice.Message.Content += *c.Delta.Content.Value
			}
			choice.Message.ReasoningContent += c.Delta.ReasoningContent
			choice.FinishReason += c.FinishReason
			if c.LogProbs != nil {
				if choice.LogProbs == nil {
					choice.LogProbs = new(wire.LogProbs)
				}
				choice.LogProbs.Content = append(choice.LogProbs.Content, c.LogProbs.Content...)
			}
		}
	}
	if last != "[DONE]" || choice.FinishReason == "" {
		t.Errorf("the stream ended with %q, finish_reason %q", last, choice.FinishReason)
	}
	return choice
}

// refusal returns the error of a chat request that is refused with 400.
func (h *hone) refusal(t *testing.T, fields string) wire.Error {
	t.Helper()
	resp, err := h.request(t.Context(), "key", fields)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct{ Error wire.Error }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("%.200s: %s, %v, expected 400", fields, resp.Status, err)
	}
	return answer.Error
}

// TestGenerationFields asks the real engine, through the API, for what each field of sampling and of the end of an answer does.
func TestGenerationFields(t *testing.T) {
	t.Setenv("HONE_CONTEXT_TOKENS", "1024")
	h := serve(t, home(t))
	const count = `"messages":[{"role":"user","content":"Write a story about a fox."}],"temperature":0`

	t.Run("logprobs and stop", func(t *testing.T) {
		const fields = count + `,"max_tokens":24,"logprobs":true,"top_logprobs":20`
		choice := h.whole(t, fields).Choices[0]
		text := *choice.Message.Content
		if len(text) < 30 || len(choice.LogProbs.Content) == 0 {
			t.Fatalf("the answer is %q with %d log-probabilities, too little for this test", text, len(choice.LogProbs.Content))
		}
		spelled := ""
		for _, token := range choice.LogProbs.Content {
			spelled += token.Token
			if len(token.TopLogProbs) != 20 || token.TopLogProbs[0].LogProb != token.LogProb {
				t.Errorf("token %q (%v) has %d alternatives", token.Token, token.LogProb, len(token.TopLogProbs))
			}
		}
		if !strings.HasPrefix(spelled, text) {
			t.Errorf("the tokens spell %q, the text is %q", spelled, text)
		}
		stream := h.streamed(t, fields)
		if diff := cmp.Diff(choice.LogProbs.Content, stream.LogProbs.Content); diff != "" || *stream.Message.Content != text || stream.FinishReason != choice.FinishReason {
			t.Errorf("streamed %q (%s), whole %q (%s); log-probabilities: %s", *stream.Message.Content, stream.FinishReason, text, choice.FinishReason, diff)
		}
		// Stop strings that begin and end inside of tokens.
		for _, at := range [][2]int{{3, 12}, {len(text) - 9, len(text) - 8}, {13, 29}} {
			stop := text[at[0]:at[1]]
			want, _, _ := strings.Cut(text, stop)
			fields := count + `,"max_tokens":24,"stop":["never said",` + string(encode(t, stop)) + `]`
			got, stream := h.whole(t, fields).Choices[0], h.streamed(t, fields)
			if *got.Message.Content != want || got.FinishReason != "stop" || *stream.Message.Content != want || stream.FinishReason != "stop" {
				t.Errorf("stop at %q: %q (%s), streamed %q (%s), expected %q", stop, *got.Message.Content, got.FinishReason, *stream.Message.Content, stream.FinishReason, want)
			}
		}
	})

	t.Run("seed and n", func(t *testing.T) {
		const sample = `"messages":[{"role":"user","content":"Write a sentence about the sea."}],"temperature":1.2,"max_tokens":12`
		several := h.whole(t, sample+`,"seed":5,"n":8`)
		texts := map[string]bool{}
		for i, choice := range several.Choices {
			if choice.Index != i || choice.FinishReason == "" {
				t.Errorf("completion %d: %+v", i, choice)
			}
			texts[*choice.Message.Content] = true
		}
		if len(several.Choices) != 8 || len(texts) < 4 {
			t.Errorf("%d completions, %d different", len(several.Choices), len(texts))
		}
		for i := range 2 {
			fields := fmt.Sprintf(`%s,"seed":%d`, sample, 5+i)
			got, want := *h.streamed(t, fields).Message.Content, *several.Choices[i].Message.Content
			if got != want {
				t.Errorf("seed %d alone gives %q, as one of eight %q", 5+i, got, want)
			}
		}
		if e := h.refusal(t, sample+`,"n":9`); e.Param == nil || *e.Param != "n" {
			t.Errorf("n 9: %+v", e)
		}
	})

	t.Run("the end", func(t *testing.T) {
		const hello = `"messages":[{"role":"user","content":"Say hello."}],"temperature":0`
		own := h.whole(t, hello+`,"max_tokens":80`)
		n := own.Usage.CompletionTokens
		if own.Choices[0].FinishReason != "stop" {
			t.Fatalf("the answer does not end by itself: %+v", own.Choices[0])
		}
		if got := h.whole(t, fmt.Sprintf(`%s,"ignore_eos":true,"max_tokens":%d`, hello, n+9)); got.Usage.CompletionTokens != n+9 || got.Choices[0].FinishReason != "length" {
			t.Errorf("ignore_eos: %+v, %s", got.Usage, got.Choices[0].FinishReason)
		}
		if got := h.whole(t, fmt.Sprintf(`%s,"min_tokens":%d,"max_tokens":%d`, hello, n+5, n+9)); got.Usage.CompletionTokens < n+5 {
			t.Errorf("min_tokens %d: %+v", n+5, got.Usage)
		}
		open := h.whole(t, `"messages":[{"role":"user","content":"Count to ten."},{"role":"assistant","content":"1, 2, 3, 4, 5,"}],"temperature":0,"max_tokens":6,"continue_final_message":true`)
		if text := *open.Choices[0].Message.Content; !strings.HasPrefix(text, " 6, 7") {
			t.Errorf("1, 2, 3, 4, 5, is continued with %q", text)
		}
	})

	t.Run("cached_tokens", func(t *testing.T) {
		instruction := strings.Repeat("Answer the question about the ticket with one word. ", 12)
		ask := func(question string) (prompt, cached int) {
			u := h.whole(t, `"messages":[{"role":"user","content":"`+instruction+question+`"}],"guided_choice":["yes","no"]`).Usage
			return u.PromptTokens, u.PromptTokensDetails.CachedTokens
		}
		if n, cached := ask("Is it late?"); n < 100 || cached > n/4 {
			t.Errorf("first: %d of %d tokens were cached", cached, n)
		}
		if n, cached := ask("Was it paid for?"); cached < 100 || cached >= n-2 {
			t.Errorf("another question: %d of %d tokens were cached", cached, n)
		}
		if n, cached := ask("Is it late?"); cached != n-1 {
			t.Errorf("the same question: %d of %d tokens were cached", cached, n)
		}
	})

	t.Run("refusals", func(t *testing.T) {
		long := h.refusal(t, `"messages":[{"role":"user","content":"`+strings.Repeat("word ", 1500)+`"}]`)
		if long.Code == nil || *long.Code != "context_length_exceeded" || !strings.Contains(long.Message, "1024") || !strings.Contains(long.Message, "15") {
			t.Errorf("a prompt of 1500 words: %+v", long)
		}
		image := h.refusal(t, `"messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,AA=="}}]}]`)
		if image.Param == nil || !strings.Contains(image.Message, "image_url") {
			t.Errorf("an image: %+v", image)
		}
		gbnf := h.refusal(t, `"messages":[{"role":"user","content":"x"}],"grammar":"root ::= \"a\""`)
		if !strings.Contains(gbnf.Message, "GBNF") {
			t.Errorf("GBNF: %+v", gbnf)
		}
		kwargs := h.refusal(t, `"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"documents":[]}`)
		if !strings.Contains(kwargs.Message, "documents") {
			t.Errorf("another variable of templates: %+v", kwargs)
		}
		parts := h.whole(t, `"messages":[{"role":"user","content":[{"type":"text","text":"Say "},{"type":"text","text":"hello."}]}],"temperature":0,"max_tokens":6`)
		if flat := h.whole(t, `"messages":[{"role":"user","content":"Say hello."}],"temperature":0,"max_tokens":6`); *parts.Choices[0].Message.Content != *flat.Choices[0].Message.Content {
			t.Errorf("in parts %q, as one text %q", *parts.Choices[0].Message.Content, *flat.Choices[0].Message.Content)
		}
	})
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// thinks is a chat template of a model that thinks unless it is told not to.
const thinks = `{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and enable_thinking is false %}
</think>

{% endif %}{% endif %}`

// TestThinking serves the default model with a template that thinks, and examples to do it after.
func TestThinking(t *testing.T) {
	dir := t.TempDir()
	template := filepath.Join(dir, "thinks.jinja")
	if err := os.WriteFile(template, []byte(thinks), 0o600); err != nil {
		t.Fatal(err)
	}
	store, err := models.Open(filepath.Join(dir, "models"), models.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Add(t.Context(), modeltest.Path(t), models.AddOptions{Name: model, ChatTemplate: template}); err != nil {
		t.Fatal(err)
	}
	h := serve(t, dir)
	var messages []wire.Message
	for _, word := range []string{"red", "blue", "green", "black"} {
		messages = append(messages, wire.Message{Role: "user", Content: "Say " + word},
			wire.Message{Role: "assistant", ReasoningContent: "The word is " + word + ".", Content: word})
	}
	messages = append(messages, wire.Message{Role: "user", Content: "Say white"})
	fields := `"temperature":0,"max_tokens":40,"logprobs":true,"messages":` + string(encode(t, messages))

	answer := h.whole(t, fields)
	message := answer.Choices[0].Message
	if !strings.Contains(message.ReasoningContent, "The word is white.") || strings.TrimSpace(*message.Content) != "white" ||
		answer.Usage.CompletionTokensDetails.ReasoningTokens == 0 || answer.Usage.CompletionTokensDetails.ReasoningTokens >= answer.Usage.CompletionTokens {
		t.Errorf("reasoning %q, content %q, usage %+v", message.ReasoningContent, *message.Content, answer.Usage)
	}
	stream := h.streamed(t, fields)
	if stream.Message.ReasoningContent != message.ReasoningContent || *stream.Message.Content != *message.Content ||
		cmp.Diff(stream.LogProbs.Content, answer.Choices[0].LogProbs.Content) != "" {
		t.Errorf("streamed %q, %q, whole %q, %q", stream.Message.ReasoningContent, *stream.Message.Content, message.ReasoningContent, *message.Content)
	}
	for _, off := range []string{`"chat_template_kwargs":{"enable_thinking":false}`, `"reasoning_effort":"none"`} {
		answer := h.whole(t, fields+","+off)
		if message := answer.Choices[0].Message; message.ReasoningContent != "" || !strings.Contains(*message.Content, "white") || answer.Usage.CompletionTokensDetails.ReasoningTokens != 0 {
			t.Errorf("%s: reasoning %q, content %q, usage %+v", off, message.ReasoningContent, *message.Content, answer.Usage)
		}
	}
	constrained := h.whole(t, fields+`,"guided_choice":["white","a colour"]`)
	if message := constrained.Choices[0].Message; message.ReasoningContent != "" || *message.Content != "white" {
		t.Errorf("constrained: %+v", message)
	}
}

// TestQueue fills the queue of a model that computes two requests at a time: it gives another client its turn, refuses one
// more than it may hold, and lets go of those that are cancelled, wherever they are.
func TestQueue(t *testing.T) {
	t.Setenv("HONE_SEQUENCES", "2")
	t.Setenv("HONE_RUNNER_QUEUE", "2")
	h := serve(t, home(t))
	const short = `"messages":[{"role":"user","content":"Say hello."}],"temperature":0,"max_tokens":4`
	want := *h.whole(t, short).Choices[0].Message.Content
	var streams sync.WaitGroup
	// long begins an endless stream; begun is closed with its first text, and it counts as ended if it was not cancelled.
	long := func(text string) (begun chan struct{}, cancel func()) {
		ctx, cancel := context.WithCancel(t.Context())
		begun = make(chan struct{})
		streams.Go(func() {
			var resp *http.Response
			for {
				var err error
				if resp, err = h.request(ctx, "many", `"messages":[{"role":"user","content":"`+text+`"}],"temperature":0,"ignore_eos":true,"stream":true`); err != nil {
					return // cancelled
				}
				defer resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					break
				}
				time.Sleep(20 * time.Millisecond) // the runner learns a little later than the server that others were cancelled
			}
			lines := bufio.NewReader(resp.Body)
			for first := true; ; {
				line, err := lines.ReadString('\n')
				if err != nil {
					if ctx.Err() == nil {
						t.Errorf("%.30s: the stream ended with %v", text, err)
					}
					return
				}
				if first && strings.Contains(line, `"content":"`) && !strings.Contains(line, `"content":""`) {
					first = false
					close(begun)
				}
			}
		})
		return begun, cancel
	}
	requests := func(n int) {
		t.Helper()
		h.eventually(t, model, func(s child.ModelState) bool { return s.Requests == n })
	}
	first, cancelFirst := long("Write about foxes.")
	second, cancelSecond := long("Write about cats.")
	<-first
	<-second
	queued, cancelQueued := long("Write about geese.")
	requests(3)

	other, err := h.request(t.Context(), "one", short)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Body.Close()
	var answer wire.ChatCompletion
	if err := json.NewDecoder(other.Body).Decode(&answer); err != nil || len(answer.Choices) != 1 || *answer.Choices[0].Message.Content != want {
		t.Errorf("another client's request: %s, %+v, %v", other.Status, answer, err)
	}
	select {
	case <-queued:
		t.Error("the queued stream began before the other client's request")
	default:
	}

	// One of two more may wait.
	ctx, cancelLast := context.WithCancel(t.Context())
	defer cancelLast()
	answered := make(chan string, 2)
	for range 2 {
		streams.Go(func() {
			resp, err := h.request(ctx, "many", short)
			if err != nil {
				return // cancelled
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			answered <- fmt.Sprintf("%d, Retry-After %s, %s", resp.StatusCode, resp.Header.Get("Retry-After"), body)
		})
	}
	if got := <-answered; !regexp.MustCompile(`^429, Retry-After [1-9].*"code":"rate_limit_exceeded"`).MatchString(got) {
		t.Errorf("a full queue answered %s", got)
	}

	cancelQueued()
	cancelLast()
	requests(2)
	cancelSecond() // while it is decoded
	requests(1)
	_, cancelPrompt := long(strings.Repeat("one fox and two geese ", 800))
	requests(2)
	time.Sleep(100 * time.Millisecond) // the prompt is computed for seconds
	cancelPrompt()
	requests(1)
	cancelFirst()
	requests(0)
	streams.Wait()
	if got := *h.whole(t, short).Choices[0].Message.Content; got != want {
		t.Errorf("after all: %q, before %q", got, want)
	}
}
