package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	openai "github.com/sashabaranov/go-openai"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/batch"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

// echo is a Generator whose model repeats the last message or the prompt word by word, or takes the first choice, which
// has the probability 0.9. Completion i puts i apostrophes after each word. Some words act: die ends the process, toolong
// is refused, busy and loading are for later, badregex refuses a constraint, wait goes on until the request is cancelled,
// panic panics, cut ends without the end, think is reasoned, call calls two tools.
type echo struct {
	mu        sync.Mutex
	requests  []child.GenerateRequest
	bases     []child.Base
	embeds    []child.EmbedRequest
	tokenizes []child.TokenizeRequest
	running   int // now, and the most at a time
	most      int
	cancelled chan struct{}
	hold      chan struct{} // the word hold waits until it is closed
}

func (e *echo) last() (child.GenerateRequest, child.Base) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.requests[len(e.requests)-1], e.bases[len(e.bases)-1]
}

// echoPrompt is what the model repeats.
func echoPrompt(req child.GenerateRequest) string {
	switch {
	case req.Prompt != nil:
		return *req.Prompt
	case req.PromptTokens != nil:
		var words []string
		for _, token := range req.PromptTokens {
			words = append(words, fmt.Sprintf("t%d", token))
		}
		return strings.Join(words, " ")
	}
	return req.Messages[len(req.Messages)-1].Content
}

func (e *echo) Generate(ctx context.Context, base child.Base, req child.GenerateRequest) iter.Seq2[child.GenerateEvent, error] {
	e.mu.Lock()
	e.requests, e.bases = append(e.requests, req), append(e.bases, base)
	e.mu.Unlock()
	return func(yield func(child.GenerateEvent, error) bool) {
		e.mu.Lock()
		e.running++
		e.most = max(e.most, e.running)
		e.mu.Unlock()
		defer func() {
			e.mu.Lock()
			e.running--
			e.mu.Unlock()
		}()
		e.generate(ctx, req, yield)
	}
}

func (e *echo) generate(ctx context.Context, req child.GenerateRequest, yield func(child.GenerateEvent, error) bool) {
	prompt := strings.Fields(echoPrompt(req))
	words, finish := prompt, "stop"
	var probabilities []float64
	if choices := choicesOf(req); choices != nil {
		words = choices[:1]
		for i := range choices {
			p := 0.1 / float64(len(choices)-1)
			if i == 0 {
				p = 0.9
			}
			probabilities = append(probabilities, p)
		}
	}
	if req.MaxTokens > 0 && len(words) > req.MaxTokens {
		words, finish = words[:req.MaxTokens], "length"
	}
	if req.PromptOnly {
		words, finish = nil, "length"
	}
	n := max(req.N, 1)
	entry := func(piece string, p float64) []child.TokenLogProb {
		if !req.LogProbs {
			return nil
		}
		token := child.TokenLogProb{Token: piece, Bytes: []byte(piece), LogProb: p}
		for j := range req.TopLogProbs {
			token.Top = append(token.Top, child.TokenLogProb{Token: fmt.Sprint(j), Bytes: []byte{byte(200 + j)}, LogProb: math.Inf(-1)})
		}
		return []child.TokenLogProb{token}
	}
	if req.Echo {
		for i := range n {
			event := child.GenerateEvent{Index: i, Text: strings.Join(prompt, " ")}
			for j, word := range prompt {
				if j == 0 {
					event.LogProbs = append(event.LogProbs, entry(word, child.NoLogProb)...)
				} else {
					event.LogProbs = append(event.LogProbs, entry(" "+word, -0.25)...)
				}
			}
			if !yield(event, nil) {
				return
			}
		}
	}
	for at, word := range words {
		switch word {
		case "die":
			yield(child.GenerateEvent{}, &child.ExitError{Name: "runner", Code: -1, Signal: syscall.SIGABRT, Stderr: []string{"secret path"}})
			return
		case "toolong":
			yield(child.GenerateEvent{}, &child.Error{Code: child.CodeContextLength, Message: "the prompt has 9000 tokens, the context 8192"})
			return
		case "busy":
			yield(child.GenerateEvent{}, &child.Error{Code: child.CodeOverloaded, Message: "256 requests are waiting"})
			return
		case "loading":
			yield(child.GenerateEvent{}, &child.UnavailableError{Reason: child.ErrLoading, Message: "smol is loading: 3 of 9 GiB", RetryAfter: 1500 * time.Millisecond})
			return
		case "badregex":
			yield(child.GenerateEvent{}, &child.Error{Code: child.CodeInvalidRequest, Param: "regex", Message: "regex: unclosed group"})
			return
		case "wait":
			<-ctx.Done()
			close(e.cancelled)
			yield(child.GenerateEvent{}, context.Cause(ctx))
			return
		case "hold":
			<-e.hold
		case "panic":
			panic("a bug")
		case "cut":
			return
		}
		for i := range n {
			piece := word + strings.Repeat("'", i)
			if at > 0 || req.Echo {
				piece = " " + piece
			}
			events := []child.GenerateEvent{{Index: i, Text: piece, LogProbs: entry(piece, -0.5)}}
			switch word {
			case "think":
				events = []child.GenerateEvent{{Index: i, Reasoning: "hm", LogProbs: entry("hm", -0.5)}}
			case "call":
				finish = "tool_calls"
				events = []child.GenerateEvent{
					{Index: i, ToolCalls: []child.ToolCallDelta{{ID: "call_a", Name: "weather"}}},
					{Index: i, ToolCalls: []child.ToolCallDelta{{Arguments: `{"city":`}}},
					{Index: i, ToolCalls: []child.ToolCallDelta{{Arguments: `"Köln"}`}, {Index: 1, ID: "call_b", Name: "time", Arguments: "{}"}}},
				}
			}
			for _, event := range events {
				if !yield(event, nil) {
					return
				}
			}
		}
	}
	for i := range n {
		event := child.GenerateEvent{Index: i, FinishReason: finish, ChoiceProbabilities: probabilities}
		if i == n-1 {
			event.Usage = &child.Usage{PromptTokens: 7, CompletionTokens: n * len(words), CachedTokens: 3}
		}
		if !yield(event, nil) {
			return
		}
	}
}

// Embed gives each input the vector of its length and its number.
func (e *echo) Embed(_ context.Context, _ child.Base, req child.EmbedRequest) (child.EmbedResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.embeds = append(e.embeds, req)
	resp := child.EmbedResponse{PromptTokens: 5 * len(req.Inputs)}
	for i, input := range req.Inputs {
		if input.Text == "toolong" {
			return resp, &child.Error{Code: child.CodeContextLength, Message: "the input has 9000 tokens, the context 8192"}
		}
		resp.Vectors = append(resp.Vectors, []float32{float32(len(input.Text) + len(input.Tokens)), float32(i), 0.5})
	}
	return resp, nil
}

// Tokenize makes a token of each byte.
func (e *echo) Tokenize(_ context.Context, _ child.Base, req child.TokenizeRequest) (child.TokenizeResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tokenizes = append(e.tokenizes, req)
	resp := child.TokenizeResponse{Tokens: req.Tokens, ContextTokens: 2048, EOS: "</s>"}
	var text string
	switch {
	case req.Text != nil:
		text = *req.Text
	case req.Messages != nil:
		text = req.Messages[0].Content
	}
	if req.AddSpecialTokens {
		resp.Tokens, resp.Pieces = append(resp.Tokens, 1), append(resp.Pieces, []byte("<s>"))
	}
	for _, b := range []byte(text) {
		resp.Tokens, resp.Pieces = append(resp.Tokens, engine.Token(b)), append(resp.Pieces, []byte{b})
	}
	for _, token := range req.Tokens {
		resp.Text += string(rune(token))
	}
	return resp, nil
}

func (e *echo) Models() []child.ModelState {
	return []child.ModelState{{Model: "smol", State: child.Ready, Seconds: 2.5, IdleSeconds: 1.5, PID: 7}}
}

// bases are base models that need no files.
type bases []BaseModel

func (b bases) List(context.Context) ([]BaseModel, error) { return b, nil }

func (b bases) Get(_ context.Context, name string) (BaseModel, error) {
	i := slices.IndexFunc(b, func(m BaseModel) bool { return m.Name == name })
	if i < 0 {
		return BaseModel{}, fmt.Errorf("%q: %w", name, finetune.ErrUnknownModel)
	}
	return b[i], nil
}

// Delete does nothing: there are no files.
func (b bases) Delete(ctx context.Context, name string) error {
	_, err := b.Get(ctx, name)
	return err
}

func (b bases) Base(ctx context.Context, name string) (dir, digest string, err error) {
	m, err := b.Get(ctx, name)
	return m.Dir, m.Digest, err
}

var smolDigest = strings.Repeat("ab", 32)

// rig is a server over a real store, registry and job list; only the model is small.
type rig struct {
	*httptest.Server
	server   *Server
	echo     *echo
	store    *store.Store
	registry *adapters.Registry
	jobs     *finetune.Jobs
	dir      string
}

func newRig(t testing.TB, change ...func(*Options)) *rig {
	t.Helper()
	dir := t.TempDir()
	st, err := store.Open(t.Context(), dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	registry, err := adapters.Open(t.Context(), filepath.Join(dir, "adapters"), st, adapters.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { registry.Close() })
	models := bases{{Base: child.Base{Name: "smol", Dir: "/models/smol", Digest: smolDigest}, Architecture: "llama", ContextTokens: 2048, CreatedAt: 5}}
	// The jobs are not started: those that are created stay in their first state.
	jobs := finetune.New(finetune.Options{Store: st, Models: models, Adapters: registry, Dir: filepath.Join(dir, "jobs"), Start: startPlanner})
	batches := batch.New(batch.Options{Store: st})
	r := &rig{echo: &echo{cancelled: make(chan struct{})}, store: st, registry: registry, jobs: jobs, dir: dir}
	opts := Options{Generator: r.echo, Models: models, Adapters: registry, Jobs: jobs, Files: st, Batches: batches, Now: func() time.Time { return time.Unix(1700000000, 0) }}
	for _, c := range change {
		c(&opts)
	}
	r.server = New(opts)
	r.Server = httptest.NewServer(r.server.Handler())
	batches.Start(r.server)
	t.Cleanup(batches.Stop)
	t.Cleanup(r.Close)
	return r
}

// tuned publishes an adapter and returns its name.
func (r *rig) tuned(t *testing.T, digest string) string {
	t.Helper()
	return r.tunedAs(t, digest, "")
}

// tunedAs is tuned with an end for the name.
func (r *rig) tunedAs(t *testing.T, digest, end string) string {
	t.Helper()
	id := store.NewID("", 8)
	dir := filepath.Join(r.dir, "new-"+id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	weights := []byte("weights")
	sum := sha256.Sum256(weights)
	m := lora.Manifest{
		ID: id, Name: adapters.Name("smol", "quiz", id) + end, BaseModel: "smol", BaseDigest: digest, JobID: "ftjob-1", CreatedAt: 9, Rank: 16, Alpha: 32,
		TargetModules: []string{"q_proj"}, QuestionTemplate: "{{.Question}}", Choices: []string{"A", "B"}, MaxLength: 64,
		Files: map[string]string{lora.GGUFFile: hex.EncodeToString(sum[:])},
	}
	manifest, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{lora.GGUFFile: weights, lora.ManifestFile: manifest} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.registry.Publish(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	return m.Name
}

func (r *rig) client() *openai.Client {
	config := openai.DefaultConfig("any key")
	config.BaseURL = r.URL + "/v1"
	return openai.NewClientWithConfig(config)
}

// do sends a request and returns the status and the body.
func (r *rig) do(t *testing.T, method, path, body string, headers ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
			continue
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := r.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(resp.Header.Get("X-Request-Id"), "req_") {
		t.Errorf("%s %s: no x-request-id", method, path)
	}
	return resp.StatusCode, string(data)
}

// wantError checks the status, the envelope's four keys, the param, the code, and a part of the message.
func wantError(t *testing.T, name string, status int, body string, wantStatus int, wantParam, wantCode, wantMessage string) {
	t.Helper()
	var envelope struct {
		Error map[string]*string `json:"error"`
	}
	if err := json.Unmarshal([]byte(body), &envelope); err != nil || len(envelope.Error) != 4 {
		t.Errorf("%s: body is not an error envelope with four keys: %s", name, body)
		return
	}
	str := func(key string) string {
		if envelope.Error[key] == nil {
			return ""
		}
		return *envelope.Error[key]
	}
	if status != wantStatus || str("param") != wantParam || str("code") != wantCode || !strings.Contains(str("message"), wantMessage) {
		t.Errorf("%s: got %d %s\nwant %d, param %q, code %q, message with %q", name, status, body, wantStatus, wantParam, wantCode, wantMessage)
	}
}

func TestRouting(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	if status, body := r.do(t, "GET", "/health", ""); status != 200 || body != `{"status":"ok","models":[{"model":"smol","state":"ready","seconds":2.5,"idle_seconds":1.5,"requests":0,"pid":7}]}`+"\n" {
		t.Errorf("health: %d %s", status, body)
	}
	for _, test := range []struct {
		method, path string
		status       int
		code         string
	}{
		{"GET", "/", 404, "unknown_url"},
		{"GET", "/v1/embeddings", 405, "method_not_allowed"},
		{"POST", "/v1/chat/completions/", 404, "unknown_url"},
		{"GET", "/v1/chat/completions", 405, "method_not_allowed"},
		{"PUT", "/v1/files", 405, "method_not_allowed"},
		{"POST", "/v1/models/smol", 405, "method_not_allowed"},
		{"GET", "/v1/models/none", 404, "model_not_found"},
		{"DELETE", "/v1/models/none", 404, "model_not_found"},
		{"DELETE", "/v1/models/ft:none", 404, "model_not_found"},
		{"GET", "/v1/files/none", 404, "not_found"},
		{"GET", "/v1/files/none/content", 404, "not_found"},
		{"DELETE", "/v1/files/none", 404, "not_found"},
		{"GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404, "unknown_url"},
		{"GET", "/v1/fine_tuning/jobs/none", 404, "not_found"},
		{"POST", "/v1/fine_tuning/jobs/none/cancel", 404, "not_found"},
		{"GET", "/v1/fine_tuning/jobs/none/events", 404, "not_found"},
		{"GET", "/v1/fine_tuning/jobs/none/checkpoints", 404, "not_found"},
	} {
		status, body := r.do(t, test.method, test.path, "")
		if status != test.status || !strings.Contains(body, `"code":"`+test.code+`"`) || !strings.HasPrefix(body, `{"error":{"message":`) {
			t.Errorf("%s %s: %d %s, want %d %s", test.method, test.path, status, body, test.status, test.code)
		}
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, test := range []struct {
		name, method string
		headers      []string
		want         int
	}{
		{"address", "GET", nil, 200},
		{"localhost", "GET", []string{"Host", "localhost:8080"}, 200},
		{"IPv6", "GET", []string{"Host", "[::1]:8080"}, 200},
		{"another address of this machine", "GET", []string{"Host", "192.168.0.7:8080"}, 200},
		{"name under localhost", "GET", []string{"Host", "hone.localhost"}, 200},
		{"rebound name", "GET", []string{"Host", "evil.example:8080"}, 403},
		{"name that only begins so", "GET", []string{"Host", "localhost.evil.example"}, 403},
		{"address that only begins so", "GET", []string{"Host", "127.0.0.1.evil.example"}, 403},
		{"page of another site writes", "POST", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"page of another origin writes", "POST", []string{"Origin", "http://evil.example"}, 403},
		{"page of another origin reads", "GET", []string{"Origin", "http://evil.example"}, 200},
	} {
		path := "/health"
		if test.method == "POST" {
			path = "/v1/chat/completions"
		}
		if status, body := r.do(t, test.method, path, "{}", test.headers...); status != test.want {
			t.Errorf("%s: %d %s, want %d", test.name, status, body, test.want)
		}
	}
}

func TestPanicIsAPlain500(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	status, body := r.do(t, "POST", "/v1/chat/completions", `{"model":"smol","messages":[{"role":"user","content":"panic"}]}`)
	if status != 500 || strings.Contains(body, "a bug") || strings.Contains(body, "goroutine") {
		t.Errorf("got %d %s", status, body)
	}
}

func TestModels(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	name := r.tuned(t, smolDigest)
	list, err := r.client().ListModels(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Models) != 2 || list.Models[0].ID != "smol" || list.Models[1].ID != name {
		t.Fatalf("listed %+v", list.Models)
	}
	for _, path := range []string{name, strings.ReplaceAll(name, ":", "%3A")} {
		if status, body := r.do(t, "GET", "/v1/models/"+path, ""); status != 200 || !strings.Contains(body, `"id":"`+name+`"`) ||
			!strings.Contains(body, `"question_template":"{{.Question}}"`) {
			t.Errorf("get %s: %d %s", path, status, body)
		}
	}
	if status, body := r.do(t, "GET", "/v1/models/a%2Fb", ""); status != 404 || !strings.Contains(body, `the model \"a/b\" does not exist; there is smol`) {
		t.Errorf("a name with a slash: %d %s", status, body)
	}
	job, err := r.jobs.Create(t.Context(), finetune.Spec{Model: "smol", TrainingFile: r.upload(t)})
	if err != nil {
		t.Fatal(err)
	}
	status, body := r.do(t, "DELETE", "/v1/models/smol", "")
	wantError(t, "delete of a base model in use", status, body, 409, "model", "model_in_use", "base model of job "+job.ID+", "+name+";")
	if _, err := r.jobs.Cancel(t.Context(), job.ID); err != nil {
		t.Fatal(err)
	}
	if resp, err := r.client().DeleteFineTuneModel(t.Context(), name); err != nil || !resp.Deleted || resp.ID != name {
		t.Errorf("delete: %+v, %v", resp, err)
	}
	if status, _ := r.do(t, "GET", "/v1/models/"+name, ""); status != 404 {
		t.Errorf("after the deletion: %d", status)
	}
	if status, body := r.do(t, "DELETE", "/v1/models/smol", ""); status != 200 || body != `{"id":"smol","object":"model","deleted":true}`+"\n" {
		t.Errorf("delete of a base model that nothing needs: %d %s", status, body)
	}
	for _, id := range []string{"a%2Fb", "a/b", "ft:a%2Fb:local::c", "ft:a/b:local::c"} {
		status, body := r.do(t, "DELETE", "/v1/models/"+id, "")
		wantError(t, id, status, body, 404, "model", "model_not_found", strings.ReplaceAll(id, "%2F", "/"))
	}
}

// A tuned model that is deleted while it answers is gone at once, and its streams come to their end with its weights there.
func TestDeleteWhileServing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	name := r.tuned(t, smolDigest)
	adapter, err := r.registry.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	r.echo.hold = make(chan struct{})
	stream, err := r.client().CreateChatCompletionStream(t.Context(), openai.ChatCompletionRequest{
		Model: name, Messages: []openai.ChatCompletionMessage{{Role: "user", Content: "one hold two"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	text := ""
	next := func() error {
		chunk, err := stream.Recv()
		if err == nil && len(chunk.Choices) > 0 {
			text += chunk.Choices[0].Delta.Content
		}
		return err
	}
	for text == "" {
		if err := next(); err != nil {
			t.Fatal(err)
		}
	}
	if status, body := r.do(t, "DELETE", "/v1/models/"+name, ""); status != 200 {
		t.Errorf("delete: %d %s", status, body)
	}
	if status, _ := r.do(t, "GET", "/v1/models/"+name, ""); status != 404 {
		t.Errorf("after the deletion: %d", status)
	}
	if _, err := os.Stat(adapter.GGUF()); err != nil {
		t.Errorf("the weights of a running stream: %v", err)
	}
	close(r.echo.hold)
	for err = next(); err == nil; err = next() { //nolint:revive // next collects
	}
	if !errors.Is(err, io.EOF) || text != "one hold two" {
		t.Errorf("the stream ended with %v after %q", err, text)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(adapter.Dir); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the files of the deleted model are still there")
		}
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	client := r.client()
	var ids []string
	for i := range 3 {
		file, err := client.CreateFileBytes(t.Context(), openai.FileBytesRequest{Name: fmt.Sprintf("t%d.jsonl", i), Bytes: []byte{'a' + byte(i)}, Purpose: openai.PurposeFineTune})
		if err != nil {
			t.Fatal(err)
		}
		if file.Bytes != 1 || file.FileName != fmt.Sprintf("t%d.jsonl", i) || file.Status != "processed" || file.Purpose != "fine-tune" {
			t.Errorf("created %+v", file)
		}
		ids = append(ids, file.ID)
	}
	content, err := client.GetFileContent(t.Context(), ids[1])
	if err != nil {
		t.Fatal(err)
	}
	if data, _ := io.ReadAll(content); string(data) != "b" {
		t.Errorf("content %q", data)
	}
	content.Close()
	listed := func(query string) (got []string, more bool) {
		_, body := r.do(t, "GET", "/v1/files"+query, "")
		var list struct {
			Data []struct {
				ID string `json:"id"`
			} `json:"data"`
			HasMore *bool `json:"has_more"`
		}
		if err := json.Unmarshal([]byte(body), &list); err != nil || list.HasMore == nil {
			t.Fatalf("%s: %s", query, body)
		}
		for _, f := range list.Data {
			got = append(got, f.ID)
		}
		return got, *list.HasMore
	}
	if got, more := listed(""); !slices.Equal(got, []string{ids[2], ids[1], ids[0]}) || more {
		t.Errorf("all: %v, %v", got, more)
	}
	if got, more := listed("?limit=2&order=asc"); !slices.Equal(got, ids[:2]) || !more {
		t.Errorf("first two: %v, %v", got, more)
	}
	if got, more := listed("?order=asc&after=" + ids[1]); !slices.Equal(got, ids[2:]) || more {
		t.Errorf("after the second: %v, %v", got, more)
	}
	if got, _ := listed("?purpose=batch"); len(got) != 0 {
		t.Errorf("of another purpose: %v", got)
	}
	for query, param := range map[string]string{"?limit=0": "limit", "?limit=x": "limit", "?order=up": "order", "?after=none": "after"} {
		status, body := r.do(t, "GET", "/v1/files"+query, "")
		wantError(t, query, status, body, 400, param, "", param)
	}
	if err := client.DeleteFile(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := client.GetFile(t.Context(), ids[0]); err == nil {
		t.Error("a deleted file is still there")
	}
}

// form builds a multipart body from parts in order: name, file name ("" for a field), value.
func form(parts ...[3]string) (body, contentType string) {
	const boundary = "xxBOUNDARYxx"
	var b strings.Builder
	for _, part := range parts {
		fmt.Fprintf(&b, "--%s\r\nContent-Disposition: form-data; name=%q", boundary, part[0])
		if part[1] != "" {
			fmt.Fprintf(&b, "; filename=%q", part[1])
		}
		fmt.Fprintf(&b, "\r\n\r\n%s\r\n", part[2])
	}
	fmt.Fprintf(&b, "--%s--\r\n", boundary)
	return b.String(), "multipart/form-data; boundary=" + boundary
}

func TestUploadForms(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, test := range []struct {
		name  string
		parts [][3]string
		cut   int // bytes cut off the end
		param string
		part  string // of the error or of the answer
	}{
		{name: "purpose first", parts: [][3]string{{"purpose", "", "fine-tune"}, {"file", "a.jsonl", "x"}}, part: `"filename":"a.jsonl"`},
		{name: "file first", parts: [][3]string{{"file", "a.jsonl", "xyz"}, {"purpose", "", "fine-tune"}}, part: `"bytes":3`},
		{name: "path as name", parts: [][3]string{{"purpose", "", "fine-tune"}, {"file", "../../etc/passwd", "x"}}, part: `"filename":"passwd"`},
		{name: "Chinese name", parts: [][3]string{{"purpose", "", "fine-tune"}, {"file", "训练.jsonl", "x"}}, part: `"filename":"训练.jsonl"`},
		{name: "no purpose", parts: [][3]string{{"file", "a", "x"}}, param: "purpose", part: "no field named purpose"},
		{name: "wrong purpose", parts: [][3]string{{"purpose", "", "fun"}, {"file", "a", "x"}}, param: "purpose", part: `purpose is \"fun\", expected one of fine-tune`},
		{name: "no file", parts: [][3]string{{"purpose", "", "fine-tune"}}, param: "file", part: "no field named file"},
		{name: "file without a name", parts: [][3]string{{"purpose", "", "fine-tune"}, {"file", "", "x"}}, param: "file", part: "not a file"},
		{name: "empty file", parts: [][3]string{{"purpose", "", "fine-tune"}, {"file", "a.jsonl", ""}}, param: "file", part: "a.jsonl is empty"},
		{name: "cut off", parts: [][3]string{{"purpose", "", "fine-tune"}, {"file", "a.jsonl", strings.Repeat("x", 1000)}}, cut: 500, param: "file", part: "cut off"},
		{name: "two files", parts: [][3]string{{"file", "a", "x"}, {"file", "b", "y"}}, param: "file", part: "more than one file"},
		{name: "purpose of the server", parts: [][3]string{{"purpose", "", "batch_output"}, {"file", "a", "x"}}, param: "purpose", part: "files that the server writes"},
		{name: "expiry after the file", parts: [][3]string{{"file", "b", "y"}, {"purpose", "", "fine-tune"}, {"expires_after[anchor]", "", "created_at"}, {"expires_after[seconds]", "", "3600"}}, part: `"expires_at":`},
		{name: "expiry too soon", parts: [][3]string{{"expires_after[anchor]", "", "created_at"}, {"expires_after[seconds]", "", "3599"}, {"purpose", "", "fine-tune"}, {"file", "b", "y"}}, param: "expires_after.seconds", part: "expected 3600 to 2592000"},
		{name: "expiry that is no number", parts: [][3]string{{"expires_after[seconds]", "", "soon"}, {"purpose", "", "fine-tune"}, {"file", "b", "y"}}, param: "expires_after.seconds", part: `is \"soon\"`},
		{name: "expiry without an anchor", parts: [][3]string{{"expires_after[seconds]", "", "3600"}, {"purpose", "", "fine-tune"}, {"file", "b", "y"}}, param: "expires_after.anchor", part: "expected created_at"},
	} {
		body, contentType := form(test.parts...)
		status, answer := r.do(t, "POST", "/v1/files", body[:len(body)-test.cut], "Content-Type", contentType)
		if test.param == "" {
			if status != 200 || !strings.Contains(answer, test.part) {
				t.Errorf("%s: %d %s", test.name, status, answer)
			}
			continue
		}
		if status != 400 || !strings.Contains(answer, `"param":"`+test.param+`"`) || !strings.Contains(answer, test.part) {
			t.Errorf("%s: %d %s, want param %s and %s", test.name, status, answer, test.param, test.part)
		}
	}
	status, body := r.do(t, "POST", "/v1/files", `{"purpose":"fine-tune"}`, "Content-Type", "application/json")
	wantError(t, "JSON", status, body, 415, "", "unsupported_media_type", "multipart/form-data")
}

func TestFileLimit(t *testing.T) {
	t.Parallel()
	for size, want := range map[int]bool{9: true, 10: true, 11: false} {
		data, err := io.ReadAll(&fileLimit{r: bytes.NewReader(make([]byte, size)), left: 10})
		if (err == nil) != want || want && len(data) != size {
			t.Errorf("%d bytes under a limit of 10: read %d, %v", size, len(data), err)
		}
	}
}

func choicesOf(req child.GenerateRequest) []string {
	if req.Constraint == nil {
		return nil
	}
	return req.Constraint.Choices
}
