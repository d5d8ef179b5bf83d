//go:build cgo

package conformance_test

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/internal/app"
	"github.com/hone-llm/hone/internal/cli"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/modeltest"
)

// TestMain makes the test binary the hone command, for the children that the server starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "runner" || os.Args[1] == "trainer") {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := cli.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	os.Exit(m.Run())
}

//go:embed testdata/openai.json
var openaiJSON []byte

// Names of the documents.
const (
	openaiDocument = "openai.json"
	ownDocument    = "hone.json"
)

const model = "SmolLM2-135M-Instruct"

// deviations change OpenAI's document where it is stricter than its own service and clients, each with the reason.
var deviations = []struct {
	pointer string // of the schema that is replaced
	to      string
	reason  string
}{
	{"/components/schemas/ListFilesResponse/properties/first_id", `{"type": ["string", "null"]}`, "an empty page has no ids; OpenAI's other lists say null"},
	{"/components/schemas/ListFilesResponse/properties/last_id", `{"type": ["string", "null"]}`, "as first_id"},
	{"/components/schemas/ListBatchesResponse/properties/first_id", `{"type": ["string", "null"]}`, "as in the list of files"},
	{"/components/schemas/ListBatchesResponse/properties/last_id", `{"type": ["string", "null"]}`, "as in the list of files"},
	{"/components/schemas/CreateCompletionResponse/properties/choices/items/properties/finish_reason", `{"type": ["string", "null"], "enum": ["stop", "length", "content_filter", null]}`,
		"the document has no schema for the events of a stream; OpenAI sends null until the end"},
	{"/components/schemas/CreateCompletionResponse/properties/usage", `{"anyOf": [{"$ref": "#/components/schemas/CompletionUsage"}, {"type": "null"}]}`,
		"null in the events before the last, as in chats' streams"},
	{"/components/schemas/CreateCompletionResponse/properties/choices/items/properties/logprobs/anyOf/0/properties/token_logprobs", `{"type": "array", "items": {"type": ["number", "null"]}}`,
		"nothing precedes the first token of an echoed prompt: OpenAI and vLLM send null"},
	{"/components/schemas/CreateCompletionResponse/properties/choices/items/properties/logprobs/anyOf/0/properties/top_logprobs", `{"type": "array", "items": {"type": ["object", "null"], "additionalProperties": {"type": "number"}}}`,
		"as token_logprobs"},
	{"/components/schemas/Embedding/properties/embedding", `{"type": ["array", "string"], "items": {"type": "number"}}`, "a string with encoding_format base64"},
	{"/components/schemas/OpenAIFile/properties/purpose", `{"enum": ["assistants", "assistants_output", "batch", "batch_output", "fine-tune", "fine-tune-results", "vision", "user_data", "evals"]}`,
		"the document takes evals in an upload and leaves it out of the answer"},
}

// extensions are the keys that hone adds to OpenAI's objects, by the path of the endpoint and of the key. All of them are
// objects or lists of their own, or fields that other servers and OpenAI's own examples have.
var extensions = map[string]string{
	".hone":                                "what OpenAI's object has no fields for",
	".data[].hone":                         "as .hone, in lists",
	".user_provided_suffix":                "in the examples of OpenAI's document",
	".data[].user_provided_suffix":         "as .user_provided_suffix, in lists",
	".choices[].choice_probabilities":      "of a constraint to choices",
	".choices[].message.reasoning_content": "llama-server's and vLLM's name",
	".choices[].delta.reasoning_content":   "as in messages",
	".parent":                              "vLLM's name of a tuned model's base",
	".data[].parent":                       "as .parent, in lists",
	".first_id":                            "all lists have it; OpenAI's lists of models, jobs and events lack it",
	".last_id":                             "as .first_id",
	".has_more":                            "as .first_id",
	".data[].metrics.total_steps":          "in OpenAI's own events",
	".data[].metrics.learning_rate":        "of the step, as HF Trainer logs it",
	".data[].metrics.grad_norm":            "as learning_rate",
	".data[].metrics.best":                 "the checkpoint with the best validation metric so far",
}

// deviate applies deviations, and fails for one that the document has no place for.
func deviate(t *testing.T) func(root map[string]any) {
	return func(root map[string]any) {
		for _, d := range deviations {
			at := &document{root: root}
			i := strings.LastIndex(d.pointer, "/")
			parent, ok := at.at(d.pointer[:i]).(map[string]any)
			if !ok || parent[d.pointer[i+1:]] == nil {
				t.Errorf("the deviation %s is in no schema any more: remove it", d.pointer)
				continue
			}
			var to any
			if err := json.Unmarshal([]byte(d.to), &to); err != nil {
				t.Fatalf("deviation %s: %v", d.pointer, err)
			}
			parent[d.pointer[i+1:]] = to
		}
	}
}

// server is a running hone with the default model, and a client whose every answer is validated.
type server struct {
	t       *testing.T
	app     *app.App
	url     string
	client  *http.Client
	checker *checker
}

func start(t *testing.T, changes ...func(*configs.Config)) *server {
	t.Helper()
	cfg, err := configs.Default()
	if err != nil {
		t.Fatal(err)
	}
	cfg.DataDir, cfg.Port, cfg.DefaultModel = t.TempDir(), 0, ""
	for _, change := range changes {
		change(&cfg)
	}
	modelStore, err := models.Open(filepath.Join(cfg.DataDir, "models"), models.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := modelStore.Add(t.Context(), modeltest.Path(t), models.AddOptions{Name: model}); err != nil {
		t.Fatal(err)
	}
	a := app.New(cfg, app.Options{})
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := a.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	openai, err := newDocument(openaiDocument, "/v1", openaiJSON, deviate(t))
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, app: a, url: "http://" + a.Addr(), checker: &checker{t: t, documents: []*document{openai}}}
	s.client = &http.Client{Transport: s.checker}
	own, err := newDocument(ownDocument, "", s.send(http.StatusOK, http.MethodGet, "/openapi.json", "").body)
	if err != nil {
		t.Fatal(err)
	}
	s.checker.documents = append(s.checker.documents, own)
	s.send(http.StatusOK, http.MethodGet, "/openapi.json", "")
	return s
}

// answer is what a request got.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// get returns the value at a path of keys in the answer.
func (a answer) get(t *testing.T, path ...string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	for _, key := range path {
		switch node := v.(type) {
		case map[string]any:
			v = node[key]
		case []any:
			v = node[0]
		}
	}
	return v
}

func (a answer) id(t *testing.T) string {
	t.Helper()
	id, _ := a.get(t, "id").(string)
	if id == "" {
		t.Fatalf("no id in %s", a.body)
	}
	return id
}

func (s *server) do(req *http.Request) answer {
	s.t.Helper()
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, body}
}

// send sends a JSON body, or none, and wants a status.
func (s *server) send(want int, method, path, body string) answer {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	got := s.do(req)
	if got.status != want {
		s.t.Errorf("%s %s %.300s: %d, want %d: %.600s", method, path, body, got.status, want, got.body)
	}
	return got
}

// form sends a multipart form; the value of a file begins with @name:.
func (s *server) form(want int, path string, fields ...string) answer {
	s.t.Helper()
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	for i := 0; i < len(fields); i += 2 {
		value := fields[i+1]
		if name, content, ok := strings.Cut(strings.TrimPrefix(value, "@"), ":"); ok && strings.HasPrefix(value, "@") {
			part, err := w.CreateFormFile(fields[i], name)
			if err != nil {
				s.t.Fatal(err)
			}
			_, _ = io.WriteString(part, content)
			continue
		}
		_ = w.WriteField(fields[i], value)
	}
	_ = w.Close()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.url+path, &body)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", w.FormDataContentType())
	got := s.do(req)
	if got.status != want {
		s.t.Errorf("POST %s: %d, want %d: %s", path, got.status, want, got.body)
	}
	return got
}

// ended waits for a job or batch to reach a last status, and returns it.
func (s *server) ended(path string) answer {
	s.t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		got := s.send(http.StatusOK, http.MethodGet, path, "")
		switch status := got.get(s.t, "status"); status {
		case "succeeded", "failed", "cancelled", "completed", "expired":
			return got
		default:
			if time.Now().After(deadline) {
				s.t.Fatalf("%s is still %v", path, status)
			}
		}
	}
}

// rows are n lines of a training file with the same short answer.
func rows(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `{"messages":[{"role":"user","content":"Question %d"},{"role":"assistant","content":"banana"}]}`+"\n", i)
	}
	return b.String()
}

// TestConformance sends every endpoint what it is for, and what it refuses; the transport validates the answers.
func TestConformance(t *testing.T) {
	s := start(t)
	t.Run("chat", func(t *testing.T) { s.chats(t) })
	t.Run("completions", func(t *testing.T) { s.completions(t) })
	t.Run("others", func(t *testing.T) { s.others(t) })
	t.Run("errors", func(t *testing.T) { s.errors(t) })
	t.Run("life of a job", func(t *testing.T) { s.job(t) })
	t.Run("uploads", func(t *testing.T) { s.uploads(t) })
	t.Run("batches", func(t *testing.T) { s.batches(t) })
	t.Logf("%d answers and %d events of streams were validated", s.checker.answers, s.checker.events)
	for _, d := range s.checker.documents {
		for _, op := range d.operations {
			if _, no := refused[op.method+" "+op.path]; !no && !d.seen[op.method+" "+op.path] {
				t.Errorf("%s: nothing got an answer of %s %s", d.name, op.method, op.path)
			}
		}
	}
}

// refused are operations that never succeed.
var refused = map[string]string{
	"DELETE /fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions/{permission_id}": "the permission of the only project stays",
	"DELETE /v1/fine_tuning/checkpoints/{checkpoint}/permissions/{permission}":                  "as above",
}

const (
	hello = `"model":"` + model + `","messages":[{"role":"user","content":"Say hello."}]`
	tools = `"tools":[{"type":"function","function":{"name":"get_weather","parameters":{"type":"object","properties":{"city":{"type":"string","enum":["Paris","Rome"]}},"required":["city"]}}}]`
)

func (s *server) chats(t *testing.T) {
	bodies := []string{
		hello + `,"max_tokens":4`,
		hello + `,"max_tokens":4,"n":2,"logprobs":true,"top_logprobs":3,"seed":1`,
		hello + `,"max_tokens":4,"stop":["zzz"],"logit_bias":{"1":-5}`,
		hello + `,"guided_choice":["A","B"],"logprobs":true,"top_logprobs":2`,
		hello + `,"max_tokens":60,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"],"additionalProperties":false}}}`,
		hello + `,"max_tokens":60,"tool_choice":"required",` + tools,
		hello + `,"max_tokens":60,"tool_choice":{"type":"function","function":{"name":"get_weather"}},"logprobs":true,` + tools,
	}
	for _, body := range bodies {
		s.send(http.StatusOK, http.MethodPost, "/v1/chat/completions", "{"+body+"}")
		s.send(http.StatusOK, http.MethodPost, "/v1/chat/completions", "{"+body+`,"stream":true}`)
		s.send(http.StatusOK, http.MethodPost, "/v1/chat/completions", "{"+body+`,"stream":true,"stream_options":{"include_usage":true}}`)
	}
}

func (s *server) completions(t *testing.T) {
	const prompt = `"model":"` + model + `","prompt":`
	for _, body := range []string{
		prompt + `"The capital of France","max_tokens":4`,
		prompt + `["a","b"],"max_tokens":3,"n":2,"logprobs":2`,
		prompt + `"The capital of France","echo":true,"logprobs":2,"max_tokens":2`,
		prompt + `"The capital of France","echo":true,"logprobs":2,"max_tokens":0`,
		prompt + `[1,2,3],"guided_choice":["A","B"]`,
	} {
		s.send(http.StatusOK, http.MethodPost, "/v1/completions", "{"+body+"}")
		s.send(http.StatusOK, http.MethodPost, "/v1/completions", "{"+body+`,"stream":true,"stream_options":{"include_usage":true}}`)
	}
}

func (s *server) others(t *testing.T) {
	s.send(http.StatusOK, http.MethodPost, "/v1/embeddings", `{"model":"`+model+`","input":["a cat","the economy"]}`)
	s.send(http.StatusOK, http.MethodPost, "/v1/embeddings", `{"model":"`+model+`","input":"a cat","encoding_format":"base64"}`)
	s.send(http.StatusOK, http.MethodPost, "/v1/decisions", `{"model":"`+model+`","input":"I love it.","questions":[
		{"type":"choice","name":"a","instructions":"Which?","choices":[{"value":"good"},{"value":"bad","description":"not good"},{"value":true}]},
		{"type":"predicate","instructions":"Is it good?"},
		{"type":"score","instructions":"How good?","levels":[{"label":"low"},{"label":"high"}]}]}`)
	for _, prefix := range []string{"/v1", ""} {
		s.send(http.StatusOK, http.MethodPost, prefix+"/tokenize", `{"model":"`+model+`","prompt":"Hello","return_token_strs":true}`)
		s.send(http.StatusOK, http.MethodPost, prefix+"/tokenize", `{`+hello+`}`)
		s.send(http.StatusOK, http.MethodPost, prefix+"/detokenize", `{"model":"`+model+`","tokens":[1,2]}`)
		s.send(http.StatusOK, http.MethodGet, prefix+"/tokenizer_info", "")
	}
	for _, path := range []string{"/health", "/ready", "/metrics", "/debug/pprof/goroutine"} {
		s.send(http.StatusOK, http.MethodGet, path, "")
	}
	s.send(http.StatusOK, http.MethodGet, "/v1/models", "")
	s.send(http.StatusOK, http.MethodGet, "/v1/models/"+model, "")
	s.send(http.StatusOK, http.MethodGet, "/v1/files", "") // empty pages
	s.send(http.StatusOK, http.MethodGet, "/v1/fine_tuning/jobs", "")
}

func (s *server) errors(t *testing.T) {
	for _, e := range []struct {
		status             int
		method, path, body string
	}{
		{404, "GET", "/", ""},
		{404, "GET", "/v1/nothing", ""},
		{404, "POST", "/v1/chat", "{}"},
		{404, "GET", "/debug/pprof/nothing", ""},
		{405, "GET", "/v1/chat/completions", ""},
		{415, "POST", "/v1/files", "{}"},
		{405, "PUT", "/v1/models", "{}"},
		{405, "PATCH", "/v1/files", "{}"},
		{400, "POST", "/v1/chat/completions", ""},
		{400, "POST", "/v1/chat/completions", "{"},
		{400, "POST", "/v1/chat/completions", "[]"},
		{400, "POST", "/v1/chat/completions", `{"model":"` + model + `"}`},
		{400, "POST", "/v1/chat/completions", `{` + hello + `,"temperature":"hot"}`},
		{400, "POST", "/v1/chat/completions", `{` + hello + `,"guided_nonsense":1}`},
		{400, "POST", "/v1/chat/completions", `{` + hello + `,"n":0,"stream":true}`},
		{404, "POST", "/v1/chat/completions", `{"model":"none","messages":[{"role":"user","content":"x"}]}`},
		{404, "POST", "/v1/completions", `{"model":"none","prompt":"x"}`},
		{404, "POST", "/v1/embeddings", `{"model":"none","input":"x"}`},
		{404, "GET", "/v1/models/none", ""},
		{404, "GET", "/v1/models/ft:x:local::y", ""},
		{404, "DELETE", "/v1/models/none", ""},
		{404, "GET", "/v1/files/file-none", ""},
		{404, "GET", "/v1/files/file-none/content", ""},
		{404, "DELETE", "/v1/files/file-none", ""},
		{400, "GET", "/v1/files?limit=0", ""},
		{400, "GET", "/v1/files?after=file-none", ""},
		{404, "GET", "/v1/fine_tuning/jobs/ftjob-none", ""},
		{404, "POST", "/v1/fine_tuning/jobs/ftjob-none/cancel", ""},
		{404, "GET", "/v1/fine_tuning/jobs/ftjob-none/events", ""},
		{404, "GET", "/v1/fine_tuning/jobs/ftjob-none/checkpoints", ""},
		{400, "POST", "/v1/fine_tuning/jobs", `{"model":"` + model + `","training_file":"file-none"}`},
		{400, "POST", "/v1/fine_tuning/jobs", `{"model":"` + model + `","training_file":"file-none","method":{"type":"reinforcement"}}`},
	} {
		s.send(e.status, e.method, e.path, e.body)
	}
	s.form(http.StatusBadRequest, "/v1/files", "purpose", "nonsense", "file", "@a:b")
	s.form(http.StatusBadRequest, "/v1/files", "purpose", "fine-tune")
}

func (s *server) job(t *testing.T) {
	upload := s.form(http.StatusOK, "/v1/files", "purpose", "fine-tune", "file", "@train.jsonl:"+rows(8))
	file := upload.id(t)
	s.send(http.StatusOK, http.MethodGet, "/v1/files/"+file, "")
	s.send(http.StatusOK, http.MethodGet, "/v1/files/"+file+"/content", "")
	for _, query := range []string{"", "?limit=1&order=asc&purpose=fine-tune", "?after=" + file} {
		s.send(http.StatusOK, http.MethodGet, "/v1/files"+query, "")
	}

	request := `{"model":"` + model + `","training_file":"` + file + `","validation_file":"` + file + `","suffix":"conform","seed":1,"metadata":{"a":"b"},
		"method":{"type":"supervised","supervised":{"hyperparameters":{"n_epochs":1,"batch_size":4,"learning_rate_multiplier":"auto"}}},"hone":{"r":4,"max_length":128}}`
	s.send(http.StatusOK, http.MethodPost, "/v1/fine_tuning/jobs/dry_run", request)
	created := s.send(http.StatusOK, http.MethodPost, "/v1/fine_tuning/jobs", request)
	path := "/v1/fine_tuning/jobs/" + created.id(t)
	waiting := s.send(http.StatusOK, http.MethodPost, "/v1/fine_tuning/jobs", `{"model":"`+model+`","training_file":"`+file+`"}`)
	for _, action := range []string{"pause", "resume", "cancel"} {
		s.send(http.StatusOK, http.MethodPost, "/v1/fine_tuning/jobs/"+waiting.id(t)+"/"+action, "")
	}
	s.send(http.StatusConflict, http.MethodDelete, "/v1/files/"+file, "")
	job := s.ended(path)
	if status := job.get(t, "status"); status != "succeeded" {
		t.Fatalf("the job ended %v: %s", status, job.body)
	}
	for _, query := range []string{"", "?limit=2", "?limit=1"} {
		events := s.send(http.StatusOK, http.MethodGet, path+"/events"+query, "")
		s.send(http.StatusOK, http.MethodGet, path+"/events?limit=100&after="+events.get(t, "data", "0", "id").(string), "")
		s.send(http.StatusOK, http.MethodGet, "/v1/fine_tuning/jobs"+query, "")
		s.send(http.StatusOK, http.MethodGet, path+"/checkpoints"+query, "")
	}
	s.send(http.StatusConflict, http.MethodPost, path+"/cancel", "")
	result, _ := job.get(t, "result_files", "0").(string)
	s.send(http.StatusOK, http.MethodGet, "/v1/files/"+result, "")
	s.send(http.StatusOK, http.MethodGet, "/v1/files/"+result+"/content", "")

	tuned, _ := job.get(t, "fine_tuned_model").(string)
	s.send(http.StatusOK, http.MethodGet, "/v1/models", "")
	s.send(http.StatusOK, http.MethodGet, "/v1/models/"+tuned, "")
	s.send(http.StatusOK, http.MethodPost, "/v1/chat/completions", `{"model":"`+tuned+`","messages":[{"role":"user","content":"Question 1"}],"max_tokens":4}`)
	checkpoint, _ := s.send(http.StatusOK, http.MethodGet, path+"/checkpoints", "").get(t, "data", "0", "fine_tuned_model_checkpoint").(string)
	permissions := "/v1/fine_tuning/checkpoints/" + checkpoint + "/permissions"
	permission := s.send(http.StatusOK, http.MethodGet, permissions, "").get(t, "data", "0", "id").(string)
	s.send(http.StatusOK, http.MethodGet, permissions+"?after="+permission, "")
	s.send(http.StatusOK, http.MethodPost, permissions, `{"project_ids":["proj_local"]}`)
	s.send(http.StatusBadRequest, http.MethodPost, permissions, `{"project_ids":["other"]}`)
	s.send(http.StatusConflict, http.MethodDelete, permissions+"/"+permission, "")
	s.send(http.StatusOK, http.MethodPost, "/v1/completions", `{"model":"`+checkpoint+`","prompt":"Question","max_tokens":2}`)
	s.send(http.StatusOK, http.MethodDelete, "/v1/models/"+tuned, "")
	s.send(http.StatusOK, http.MethodDelete, "/v1/files/"+file, "")

	// A file that cannot be trained on: the job fails, with its error object.
	bad := s.form(http.StatusOK, "/v1/files", "purpose", "fine-tune", "file", "@bad.jsonl:{\"messages\":[]}\n").id(t)
	failed := s.send(http.StatusOK, http.MethodPost, "/v1/fine_tuning/jobs", `{"model":"`+model+`","training_file":"`+bad+`"}`)
	if got := s.ended("/v1/fine_tuning/jobs/" + failed.id(t)); got.get(t, "status") != "failed" || got.get(t, "error", "message") == nil {
		t.Errorf("a job over bad rows: %s", got.body)
	}
	s.send(http.StatusOK, http.MethodGet, "/v1/fine_tuning/jobs/"+failed.id(t)+"/events", "")
}

func (s *server) uploads(t *testing.T) {
	content := rows(4)
	request := fmt.Sprintf(`{"filename":"a.jsonl","purpose":"fine-tune","bytes":%d,"mime_type":"application/jsonl","expires_after":{"anchor":"created_at","seconds":3600}}`, len(content))
	path := "/v1/uploads/" + s.send(http.StatusOK, http.MethodPost, "/v1/uploads", request).id(t)
	first := s.form(http.StatusOK, path+"/parts", "data", "@a:"+content[:50]).id(t)
	second := s.form(http.StatusOK, path+"/parts", "data", "@a:"+content[50:]).id(t)
	s.send(http.StatusBadRequest, http.MethodPost, path+"/complete", `{"part_ids":["`+first+`"]}`)
	done := s.send(http.StatusOK, http.MethodPost, path+"/complete", `{"part_ids":["`+first+`","`+second+`"]}`)
	s.send(http.StatusOK, http.MethodGet, "/v1/files/"+done.get(t, "file", "id").(string), "")

	path = "/v1/uploads/" + s.send(http.StatusOK, http.MethodPost, "/v1/uploads", request).id(t)
	s.send(http.StatusOK, http.MethodPost, path+"/cancel", "")
	if late := s.form(http.StatusBadRequest, path+"/parts", "data", "@a:b"); late.get(t, "error", "message") == nil {
		t.Errorf("a part after the end: %s", late.body)
	}
	s.send(http.StatusNotFound, http.MethodPost, "/v1/uploads/upload_none/cancel", "")
}

func (s *server) batches(t *testing.T) {
	batch := func(lines ...string) answer {
		t.Helper()
		file := s.form(http.StatusOK, "/v1/files", "purpose", "batch", "file", "@batch.jsonl:"+strings.Join(lines, "\n")).id(t)
		made := s.send(http.StatusOK, http.MethodPost, "/v1/batches", `{"input_file_id":"`+file+`","endpoint":"/v1/chat/completions","completion_window":"24h","metadata":{"a":"b"}}`)
		return s.ended("/v1/batches/" + made.id(t))
	}
	line := func(id, model string) string {
		return `{"custom_id":"` + id + `","method":"POST","url":"/v1/chat/completions","body":{"model":"` + model + `","messages":[{"role":"user","content":"Hi."}],"max_tokens":2}}`
	}
	completed := batch(line("a", model), line("b", "none"))
	if completed.get(t, "status") != "completed" {
		t.Fatalf("batch %s", completed.body)
	}
	for _, key := range []string{"output_file_id", "error_file_id"} {
		file := s.send(http.StatusOK, http.MethodGet, "/v1/files/"+completed.get(t, key).(string)+"/content", "")
		var result struct {
			Response struct {
				Code int             `json:"status_code"`
				Body json.RawMessage `json:"body"`
			} `json:"response"`
		}
		if err := json.Unmarshal(file.body, &result); err != nil {
			t.Fatalf("%s: %v: %s", key, err, file.body)
		}
		pointer := "/components/schemas/CreateChatCompletionResponse"
		if result.Response.Code != http.StatusOK {
			pointer = "/components/schemas/ErrorResponse"
		}
		if err := s.checker.documents[0].validate(pointer, result.Response.Body); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
	if failed := batch(line("a", model), line("a", model), "{}"); failed.get(t, "status") != "failed" || failed.get(t, "errors", "data", "0", "message") == nil {
		t.Errorf("a batch of bad lines: %s", failed.body)
	}
	s.send(http.StatusOK, http.MethodGet, "/v1/batches", "")
	s.send(http.StatusOK, http.MethodGet, "/v1/batches?limit=1&after="+completed.id(t), "")
	s.send(http.StatusNotFound, http.MethodGet, "/v1/batches/batch_none", "")
	s.send(http.StatusBadRequest, http.MethodPost, "/v1/batches", `{"input_file_id":"file-none","endpoint":"/v1/nothing","completion_window":"24h"}`)

	many := make([]string, 200)
	for i := range many {
		many[i] = line(fmt.Sprint(i), model)
	}
	file := s.form(http.StatusOK, "/v1/files", "purpose", "batch", "file", "@batch.jsonl:"+strings.Join(many, "\n")).id(t)
	path := "/v1/batches/" + s.send(http.StatusOK, http.MethodPost, "/v1/batches", `{"input_file_id":"`+file+`","endpoint":"/v1/chat/completions","completion_window":"24h"}`).id(t)
	s.send(http.StatusOK, http.MethodPost, path+"/cancel", "")
	if got := s.ended(path).get(t, "status"); got != "cancelled" {
		t.Errorf("a batch that was cancelled is %v", got)
	}
}
