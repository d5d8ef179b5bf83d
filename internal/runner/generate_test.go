package runner

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
)

// events collects a request's events.
func events(t *testing.T, r *Runner, req child.GenerateRequest) []child.GenerateEvent {
	t.Helper()
	if req.TopP == 0 {
		req.TopP = 1
	}
	var all []child.GenerateEvent
	err := r.Generate(t.Context(), req, func(e child.GenerateEvent) error {
		all = append(all, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Several completions of one prompt: computed once, each with its own seed, the usage of all with the last event.
func TestSeveralCompletions(t *testing.T) {
	r := sharedRunner(t)
	seed := int64(11)
	prompt := strings.Repeat("Several completions share this prompt. ", 8) + "Write a word:"
	request := child.GenerateRequest{Prompt: &prompt, MaxTokens: 6, Temperature: 1.5, Seed: &seed, N: 8, LogProbs: true}
	before, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	texts, finished, tokens := make([]string, 8), make([]string, 8), 0
	all := events(t, r, request)
	for i, e := range all {
		if finished[e.Index] != "" {
			t.Errorf("completion %d has an event after its last: %+v", e.Index, e)
		}
		texts[e.Index] += e.Text
		finished[e.Index] = e.FinishReason
		tokens += len(e.LogProbs)
		if (e.Usage != nil) != (i == len(all)-1) {
			t.Errorf("event %d of %d: usage %+v, want it with the last", i, len(all), e.Usage)
		}
	}
	usage := all[len(all)-1].Usage
	if slices.Contains(finished, "") || usage.CompletionTokens < tokens || usage.CompletionTokens > 48 || usage.PromptTokens > 60 {
		t.Errorf("finish reasons %q, usage %+v of %d tokens", finished, usage, tokens)
	}
	after, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Seven of the eight take the whole prompt from the cache.
	if computed := (after.PromptTokens - before.PromptTokens) - (after.ReusedTokens - before.ReusedTokens); computed > int64(usage.PromptTokens) {
		t.Errorf("%d prompt tokens were computed of a prompt of %d", computed, usage.PromptTokens)
	}
	// The same seeds one by one.
	different := map[string]bool{}
	for i := range 8 {
		single := request
		single.N, single.Seed = 0, new(int64)
		*single.Seed = seed + int64(i)
		if a := ask(t, r, single); a.Text != texts[i] {
			t.Errorf("completion %d is %q, with its seed alone %q", i, texts[i], a.Text)
		}
		different[texts[i]] = true
	}
	if len(different) < 4 {
		t.Errorf("only %d different completions of 8: %q", len(different), texts)
	}
}

// Echo with log-probabilities: those of the prompt are the ones that a completion has when it says the same.
func TestEcho(t *testing.T) {
	r := sharedRunner(t)
	text := series[1]
	said := ask(t, r, child.GenerateRequest{Prompt: &text, MaxTokens: 5, LogProbs: true, TopLogProbs: 3})
	whole := text + said.Text
	scored := ask(t, r, child.GenerateRequest{Prompt: &whole, PromptOnly: true, Echo: true, LogProbs: true, TopLogProbs: 3})
	if scored.Text != whole || scored.Finish != "length" || scored.Usage.CompletionTokens != 0 || len(scored.LogProbs) != scored.Usage.PromptTokens {
		t.Fatalf("got %q (%s), %d log-probabilities, %+v", scored.Text, scored.Finish, len(scored.LogProbs), scored.Usage)
	}
	if first := scored.LogProbs[0]; first.LogProb != child.NoLogProb || len(first.Top) != 0 {
		t.Errorf("the first token has %+v", first)
	}
	tail := scored.LogProbs[len(scored.LogProbs)-len(said.LogProbs):]
	for i, want := range said.LogProbs {
		if got := tail[i]; got.Token != want.Token || math.Abs(got.LogProb-want.LogProb) > 0.2 || len(got.Top) != 3 {
			t.Errorf("token %d: as a prompt %q (%v), as a completion %q (%v)", i, got.Token, got.LogProb, want.Token, want.LogProb)
		}
	}
	// A prompt longer than a batch, its log-probabilities in chunks, and tokens instead of text.
	long := strings.Repeat("one two three four five six seven eight nine ten ", 70)
	ids, err := r.Tokenize(t.Context(), child.TokenizeRequest{Text: &long, AddSpecialTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	scored = ask(t, r, child.GenerateRequest{PromptTokens: ids.Tokens, MaxTokens: 3, Echo: true, LogProbs: true, N: 2})
	echoed := 0
	for _, p := range scored.LogProbs {
		if p.LogProb == child.NoLogProb {
			echoed++
		}
	}
	if len(ids.Tokens) < 600 || echoed != 2 || len(scored.LogProbs) != 2*(len(ids.Tokens)+3) || !strings.HasPrefix(scored.Text, long) || strings.Count(scored.Text, long) != 2 {
		t.Errorf("%d tokens twice with 3 more: %d log-probabilities, %d beginnings", len(ids.Tokens), len(scored.LogProbs), echoed)
	}
	// Repeated words become likely.
	if p := scored.LogProbs[len(ids.Tokens)-2]; p.LogProb < -2 {
		t.Errorf("the next word of a long series has log-probability %v", p.LogProb)
	}
}

// The probabilities of choices are those of their tokens, as scoring them as prompts gives them.
func TestChoiceProbabilities(t *testing.T) {
	r := sharedRunner(t)
	question := "Question: What is the capital of France?\nAnswer:"
	base, err := r.prompts.Encode(question)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		choices []string
		ending  bool
	}{
		{"one token", []string{" Paris", " London", " Rome"}, false},
		{"several tokens", []string{" the city of Paris", " the city of light", " London, I believe", " Rome"}, false},
		{"prefixes", []string{" Paris", " Paris, France", " Paris, France, Europe", " London"}, true},
		{"Chinese", []string{"北京，中国", "北京", "上海。"}, true},
	} {
		// What each choice's tokens have as a prompt.
		want := make([]float64, len(c.choices))
		for i, choice := range c.choices {
			spelling, err := r.prompts.Continuation(choice)
			if err != nil {
				t.Fatal(err)
			}
			ends := [][]engine.Token{nil}
			if c.ending {
				ends = nil
				for _, end := range r.ends {
					ends = append(ends, []engine.Token{end})
				}
			}
			var each []float64
			for _, end := range ends {
				scored := ask(t, r, child.GenerateRequest{PromptTokens: slices.Concat(base, spelling, end), PromptOnly: true, Echo: true, LogProbs: true})
				sum := 0.0
				for _, p := range scored.LogProbs[len(base):] {
					sum += p.LogProb
				}
				each = append(each, sum)
			}
			want[i] = logSumExp(len(each), func(i int) float64 { return each[i] })
		}
		norm := logSumExp(len(want), func(i int) float64 { return want[i] })
		all := events(t, r, child.GenerateRequest{PromptTokens: base, Constraint: choose(c.choices...), LogProbs: true, TopLogProbs: 20})
		last := all[len(all)-1]
		best, sum := 0, 0.0
		for i, p := range last.ChoiceProbabilities {
			sum += p
			if p > last.ChoiceProbabilities[best] {
				best = i
			}
			// The own engine's bits do not depend on the batch; what is left is float64.
			if math.Abs(p-math.Exp(want[i]-norm)) > 1e-6 {
				t.Errorf("%s: %q has probability %.9f, as a prompt %.9f", c.name, c.choices[i], p, math.Exp(want[i]-norm))
			}
		}
		if math.Abs(sum-1) > 1e-9 || last.Text != c.choices[best] {
			t.Errorf("%s: the answer is %q, the probabilities %v", c.name, last.Text, last.ChoiceProbabilities)
		}
		total := 0.0
		for _, p := range last.LogProbs {
			total += p.LogProb
		}
		if math.Abs(total-math.Log(last.ChoiceProbabilities[best])) > 1e-9 {
			t.Errorf("%s: the log-probabilities of the answer's tokens sum to %v, its own is %v", c.name, total, math.Log(last.ChoiceProbabilities[best]))
		}
		t.Logf("%s: %q %.4f", c.name, last.Text, last.ChoiceProbabilities)
	}
	// Drawn by these probabilities: each seed draws one, and the likeliest most often.
	counts := map[string]int{}
	for _, e := range events(t, r, child.GenerateRequest{PromptTokens: base, Constraint: choose(" a", " b", " c", " d"), Temperature: 1, Seed: new(int64), N: 8}) {
		counts[e.Text]++
	}
	if len(counts) < 2 {
		t.Errorf("eight draws of four choices: %v", counts)
	}
	// More choices than there are sequence numbers, all of several tokens.
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf(" number %d of %d", i, 7*i))
	}
	if a := ask(t, r, child.GenerateRequest{PromptTokens: base, Constraint: choose(many...)}); !slices.Contains(many, a.Text) {
		t.Errorf("of 200 choices, %q", a.Text)
	}
}

func TestEmbeddings(t *testing.T) {
	r := sharedRunner(t)
	texts := []string{"The cat sits on the mat.", "A cat is sitting on a rug.", "Quarterly revenue rose by four percent.", strings.Repeat("long text ", 300), "猫坐在垫子上。"}
	request := child.EmbedRequest{}
	for _, text := range texts {
		request.Inputs = append(request.Inputs, child.Input{Text: text})
	}
	together, err := r.Embed(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	dot := func(a, b []float32) float64 {
		sum := 0.0
		for i := range a {
			sum += float64(a[i]) * float64(b[i])
		}
		return sum
	}
	for i, v := range together.Vectors {
		if math.Abs(dot(v, v)-1) > 1e-5 {
			t.Errorf("%q: the vector's length is %v", texts[i], math.Sqrt(dot(v, v)))
		}
		alone, err := r.Embed(t.Context(), child.EmbedRequest{Inputs: request.Inputs[i : i+1]})
		if err != nil {
			t.Fatal(err)
		}
		if d := dot(v, alone.Vectors[0]); d < 0.999 {
			t.Errorf("%q: together and alone the vectors have cosine %v", texts[i], d)
		}
	}
	if near, far := dot(together.Vectors[0], together.Vectors[1]), dot(together.Vectors[0], together.Vectors[2]); near <= far {
		t.Errorf("two sentences about a cat have cosine %v, one about a cat and one about revenue %v", near, far)
	}
	for _, bad := range []child.EmbedRequest{{}, {Inputs: []child.Input{{Tokens: []engine.Token{1 << 30}}}}, {Inputs: []child.Input{{Text: strings.Repeat("word ", 2000)}}}} {
		var refusal *child.Error
		if _, err := r.Embed(t.Context(), bad); !errors.As(err, &refusal) || refusal.Code == child.CodeInternal {
			t.Errorf("got %v, want a refusal", err)
		}
	}
	// Beside a completion: nothing of an embedding stays in the cache.
	ask(t, r, continuation(series[0]))
	status, err := r.Status(t.Context())
	if err != nil || status.Running != 0 {
		t.Errorf("%+v, %v", status, err)
	}
}

func TestTokenize(t *testing.T) {
	r := sharedRunner(t)
	text := "Hello, 世界! <|im_end|>"
	got, err := r.Tokenize(t.Context(), child.TokenizeRequest{Text: &text})
	if err != nil {
		t.Fatal(err)
	}
	if got.Text != text || len(got.Tokens) != len(got.Pieces) || got.ContextTokens != 1024 {
		t.Errorf("got %+v", got)
	}
	back, err := r.Tokenize(t.Context(), child.TokenizeRequest{Tokens: got.Tokens})
	if err != nil || back.Text != text || !slices.Equal(back.Tokens, got.Tokens) {
		t.Errorf("got %+v, %v", back, err)
	}
	messages, err := r.Tokenize(t.Context(), child.TokenizeRequest{Messages: chat("Hello")})
	if err != nil || !strings.Contains(messages.Text, "Hello") || !strings.Contains(messages.Text, "<|im_start|>") {
		t.Errorf("got %+v, %v", messages, err)
	}
	for _, bad := range []child.TokenizeRequest{{}, {Text: &text, Tokens: got.Tokens}, {Tokens: []engine.Token{-1}}} {
		var refusal *child.Error
		if _, err := r.Tokenize(t.Context(), bad); !errors.As(err, &refusal) || refusal.Code != child.CodeInvalidRequest {
			t.Errorf("got %v, want a refusal", err)
		}
	}
}

// Constrained completions of every kind in one batch with free ones.
func TestConstraintsTogether(t *testing.T) {
	r := sharedRunner(t)
	schema := `{"type":"object","properties":{"city":{"type":"string","maxLength":20},"people":{"type":"integer"}},"required":["city","people"],"additionalProperties":false}`
	free := continuation(series[0])
	want := ask(t, r, free)
	var wg sync.WaitGroup
	for i, c := range []*child.Constraint{
		{Kind: child.ConstraintJSONSchema, Text: schema}, {Kind: child.ConstraintRegex, Text: `[0-9]{3}-[0-9]{4}`}, nil,
		{Kind: child.ConstraintLark, Text: `start: "yes" | "no"`}, choose("London", "Paris"), nil, {Kind: child.ConstraintJSONSchema, Text: schema},
	} {
		wg.Go(func() {
			req := child.GenerateRequest{Messages: chat("Name a city with its number of people."), Constraint: c, MaxTokens: 60}
			if c == nil {
				req = free
			}
			a, err := generate(t.Context(), r, req)
			switch {
			case err != nil:
				t.Errorf("request %d: %v", i, err)
			case c == nil && a.Text != want.Text:
				t.Errorf("beside constrained completions %q, alone %q", a.Text, want.Text)
			case c != nil && a.Finish != "stop" && c.Kind != child.ConstraintJSONSchema:
				t.Errorf("%s: %q ended with %s", c.Kind, a.Text, a.Finish)
			case c != nil && c.Kind == child.ConstraintJSONSchema && a.Finish == "stop":
				var v struct {
					City   *string `json:"city"`
					People *int    `json:"people"`
				}
				if err := json.Unmarshal([]byte(a.Text), &v); err != nil || v.City == nil || v.People == nil {
					t.Errorf("%q does not match its schema: %v", a.Text, err)
				}
			}
		})
	}
	wg.Wait()
}

// A tool that must be called is called, with arguments of its schema.
func TestToolCall(t *testing.T) {
	r := sharedRunner(t)
	tools := json.RawMessage(`[{"type":"function","function":{"name":"weather","description":"The weather of a city","parameters":{"type":"object","properties":{"city":{"enum":["Paris","London"]}},"required":["city"],"additionalProperties":false}}}]`)
	all := events(t, r, child.GenerateRequest{Messages: chat("What is the weather in Paris?"), Tools: tools, ToolChoice: child.ToolChoice{Mode: child.ToolRequired}, MaxTokens: 80})
	name, arguments, text := "", "", ""
	for _, e := range all {
		text += e.Text
		for _, call := range e.ToolCalls {
			name += call.Name
			arguments += call.Arguments
		}
	}
	var v struct{ City string }
	if err := json.Unmarshal([]byte(arguments), &v); name != "weather" || err != nil || v.City == "" || text != "" || all[len(all)-1].FinishReason != "tool_calls" {
		t.Errorf("called %q with %s, said %q, ended with %s", name, arguments, text, all[len(all)-1].FinishReason)
	}
}

// More requests than the queue may hold are refused at once, with status 429 on the socket, and cost nothing.
func TestQueueIsBounded(t *testing.T) {
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 512, Sequences: 1, Threads: 1, Queue: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	server := httptest.NewServer(r.Handler())
	defer server.Close()
	release := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			_ = r.Generate(t.Context(), child.GenerateRequest{Messages: chat("Tell me a story."), TopP: 1, MaxTokens: 3}, func(child.GenerateEvent) error {
				<-release
				return nil
			})
		})
	}
	for r.places.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
	post, err := http.Post(server.URL+"/generate", "application/json", strings.NewReader(`{"prompt":"x","top_p":1}`)) //nolint:noctx // a test
	if err != nil {
		t.Fatal(err)
	}
	defer post.Body.Close()
	var event child.GenerateEvent
	if err := json.NewDecoder(post.Body).Decode(&event); err != nil || post.StatusCode != http.StatusTooManyRequests || event.Error == nil || event.Error.Code != child.CodeOverloaded {
		t.Errorf("a full queue answered %s with %+v, %v", post.Status, event, err)
	}
	var refusal *child.Error
	if _, err := generate(t.Context(), r, continuation("x")); !errors.As(err, &refusal) || refusal.Code != child.CodeOverloaded {
		t.Errorf("a full queue answered %v", err)
	}
	close(release)
	wg.Wait()
	if a := ask(t, r, continuation(series[0])); a.Text == "" {
		t.Error("after the queue was full, nothing was said")
	}
}

// What the own engine does, llama.cpp does too, with one adapter a batch: completions beside each other, adapters in turns,
// choices, scored prompts and embeddings, equal to the own engine's but for rounding.
func TestLlamaEngine(t *testing.T) {
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 512, Sequences: 4, Threads: 2, Engine: engineLlama, CacheType: "q8_0"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	own := sharedRunner(t)
	adapters := []*child.Adapter{nil, {ID: "p", Path: randomAdapter(t, 41)}, {ID: "q", Path: randomAdapter(t, 42)}}
	type result struct {
		choices []float64
		scored  answer
		vectors child.EmbedResponse
	}
	run := func(r *Runner) []result {
		results := make([]result, len(adapters))
		var wg sync.WaitGroup
		for i, a := range adapters {
			wg.Go(func() {
				req := child.GenerateRequest{Messages: chat("What is the capital of France?"), Constraint: choose("It is Paris.", "It is London.", "Rome"), Adapter: a, TopP: 1}
				if err := r.Generate(t.Context(), req, func(e child.GenerateEvent) error {
					results[i].choices = e.ChoiceProbabilities
					return nil
				}); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				var err error
				if results[i].scored, err = generate(t.Context(), r, child.GenerateRequest{Prompt: &series[3], MaxTokens: 4, Echo: true, LogProbs: true, Adapter: a}); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				var err error
				if results[i].vectors, err = r.Embed(t.Context(), child.EmbedRequest{Inputs: []child.Input{{Text: question}, {Text: series[1]}}, Adapter: a}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		return results
	}
	got, want := run(r), run(own)
	if t.Failed() {
		return
	}
	for i := range adapters {
		difference := 0.0
		for j, p := range want[i].choices {
			difference = max(difference, math.Abs(p-got[i].choices[j]))
		}
		cosine := 0.0
		for j, x := range want[i].vectors.Vectors[1] {
			cosine += float64(x) * float64(got[i].vectors.Vectors[1][j])
		}
		mean := 0.0
		for j := 1; j < want[i].scored.Usage.PromptTokens; j++ {
			mean += math.Abs(want[i].scored.LogProbs[j].LogProb-got[i].scored.LogProbs[j].LogProb) / float64(want[i].scored.Usage.PromptTokens-1)
		}
		t.Logf("adapter %d: choices differ by %.3f, embeddings have cosine %.5f, log-probabilities differ by %.3f on average", i, difference, cosine, mean)
		// The rounding of activations to 8 bits and of the cache in another order; random adapters amplify it.
		if difference > 0.3 || cosine < 0.95 || mean > 0.6 {
			t.Errorf("adapter %d: the engines differ by more than rounding", i)
		}
	}
	for _, a := range adapters[1:] {
		r.UnloadAdapter(a.ID)
		own.UnloadAdapter(a.ID)
	}
	if _, err := New(Options{ModelDir: modelDir(t), Engine: "other"}); err == nil {
		t.Error("an unknown engine was taken")
	}
}
