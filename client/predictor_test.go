package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// api is a small server that answers every question with the letter whose option is longest.
type api struct {
	*httptest.Server
	mu        sync.Mutex
	requests  []string                                  // bodies of chat requests
	intercept func(w http.ResponseWriter, n int64) bool // true: it answered the n-th chat request
	template  string                                    // of the model ft:base:local:x:1
	extension string                                    // further fields of each choice
	chats     atomic.Int64
	inFlight  atomic.Int64
	most      atomic.Int64
}

func newAPI(t *testing.T) *api {
	t.Helper()
	a := &api{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/models/{id}", func(w http.ResponseWriter, r *http.Request) {
		switch id := r.PathValue("id"); id {
		case "base":
			fmt.Fprint(w, `{"id":"base","object":"model","created":1,"owned_by":"hone","hone":{"kind":"base","digest":"d1"}}`)
		case "ft:base:local:x:1":
			template, _ := json.Marshal(a.template)
			fmt.Fprintf(w, `{"id":%q,"object":"model","created":1,"owned_by":"user","hone":{"kind":"tuned","digest":"d1","question_template":%s}}`, id, template)
		default:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"error":{"message":"the model '%s' does not exist","type":"invalid_request_error","param":"model","code":"model_not_found"}}`, id)
		}
	})
	mux.HandleFunc("POST /v1/chat/completions", a.chat)
	a.Server = httptest.NewServer(mux)
	t.Cleanup(a.Close)
	return a
}

func (a *api) chat(w http.ResponseWriter, r *http.Request) {
	n := a.chats.Add(1)
	running := a.inFlight.Add(1)
	defer a.inFlight.Add(-1)
	for most := a.most.Load(); running > most && !a.most.CompareAndSwap(most, running); most = a.most.Load() {
	}
	body, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	a.requests = append(a.requests, string(body))
	a.mu.Unlock()
	if a.intercept != nil && a.intercept(w, n) {
		return
	}
	var request struct {
		Messages []struct{ Content string }
	}
	if err := json.Unmarshal(body, &request); err != nil {
		panic(err)
	}
	if strings.Contains(request.Messages[0].Content, "endless") {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"error":{"message":"the prompt has 9000 tokens, the context 8192","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}`)
		return
	}
	letter, longest := "A", -1
	for line := range strings.SplitSeq(request.Messages[0].Content, "\n") {
		if len(line) > 3 && line[1] == '.' && len(line) > longest {
			letter, longest = line[:1], len(line)
		}
	}
	var top []string
	for _, l := range Choices {
		p := 0.1
		if l == letter {
			p = 0.7
		}
		top = append(top, fmt.Sprintf(`{"token":%q,"logprob":%g,"bytes":[%d]}`, l, math.Log(p), l[0]))
	}
	fmt.Fprintf(w, `{"id":"c","object":"chat.completion","created":1,"model":"base","choices":[{"index":0,"message":{"role":"assistant","content":%q},
		"logprobs":{"content":[{"token":%q,"logprob":%g,"bytes":[65],"top_logprobs":[%s]}]},"finish_reason":"stop"%s}],
		"usage":{"prompt_tokens":60,"completion_tokens":1,"total_tokens":61,"prompt_tokens_details":{"cached_tokens":20}}}`,
		letter, letter, math.Log(0.7), strings.Join(top, ","), a.extension)
}

// ask returns n questions whose answers are A, B, C, D, A...
func ask(n int) []Question {
	questions := make([]Question, n)
	for i := range questions {
		q := Question{ID: fmt.Sprint(100 + i), Row: i + 1, Text: fmt.Sprintf("Question %d?", i), Options: [4]string{"w", "x", "y", "z"}}
		q.Options[i%4] = "longest"
		questions[i] = q
	}
	return questions
}

func answers(t *testing.T, p *Predictor, questions []Question) string {
	t.Helper()
	var got strings.Builder
	err := p.Run(t.Context(), questions, func(p Prediction) error {
		got.WriteString(p.Answer)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got.String()
}

func TestRequestOnTheWire(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	p, err := New(server.URL+"/v1/", "key").NewPredictor(t.Context(), PredictorOptions{Model: "base"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Predict(t.Context(), Question{ID: "5", Text: "Which {a}?", Options: [4]string{"w", "{b}", "longest", "z"}})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"model":"base","messages":[{"role":"user","content":"Which {a}?\nA. w\nB. {b}\nC. longest\nD. z\nAnswer with the letter only."}],` +
		`"max_completion_tokens":8,"stream":false,"logprobs":true,"top_logprobs":4,"guided_choice":["A","B","C","D"]}`
	if diff := cmp.Diff(want, server.requests[0]); diff != "" {
		t.Errorf("request (-want +got)\n%s", diff)
	}
	if got.Answer != "C" || math.Abs(got.Confidence-0.7) > 1e-9 || math.Abs(got.Probabilities[0]-0.1) > 1e-9 || got.PromptTokens != 60 || got.CachedTokens != 20 {
		t.Errorf("prediction %+v", got)
	}
}

// TestChoiceProbabilities takes hone's own numbers before those of the first token.
func TestChoiceProbabilities(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	server.extension = `,"choice_probabilities":[{"choice":"A","probability":0.125},{"choice":"B","probability":0.125},{"choice":"C","probability":0.5},{"choice":"D","probability":0.25}]`
	p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Predict(t.Context(), ask(3)[2])
	if err != nil || got.Answer != "C" || got.Confidence != 0.5 || got.Probabilities != [4]float64{0.125, 0.125, 0.5, 0.25} || got.PromptTokens != 60 {
		t.Errorf("prediction %+v, %v", got, err)
	}
}

func TestRunKeepsTheOrder(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	server.intercept = func(_ http.ResponseWriter, n int64) bool {
		time.Sleep(time.Duration(n%5) * time.Millisecond)
		return false
	}
	p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base", Concurrency: 3})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := answers(t, p, ask(40)), strings.Repeat("ABCD", 10); got != want {
		t.Errorf("answers %s, want %s", got, want)
	}
	if most := server.most.Load(); most > 3 {
		t.Errorf("%d questions in flight, want at most 3", most)
	}
}

func TestRunRetries(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	server.intercept = func(w http.ResponseWriter, n int64) bool {
		switch n {
		case 1:
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprint(w, `{"error":{"message":"the model is loading","type":"server_error","param":null,"code":null}}`)
		case 2:
			w.WriteHeader(http.StatusTooManyRequests)
		case 3:
			panic(http.ErrAbortHandler) // the connection breaks
		default:
			return false
		}
		return true
	}
	p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base", Concurrency: 1})
	if err != nil {
		t.Fatal(err)
	}
	if got := answers(t, p, ask(4)); got != "ABCD" {
		t.Errorf("answers %s", got)
	}
}

func TestRunStopsAtWhatTheNextQuestionWouldMeetToo(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status     int
		body, want string
	}{
		"refused":          {400, `{"error":{"message":"guided_choice is not available","type":"invalid_request_error","param":"guided_choice","code":null}}`, "question 100: guided_choice is not available (HTTP 400)"},
		"not constrained":  {200, `{"choices":[{"message":{"role":"assistant","content":"The answer is A"}}]}`, `question 100: the answer "The answer is A" is none of A, B, C and D: the server does not honour guided_choice`},
		"no answer at all": {200, `{"choices":[]}`, "question 100: the server sent 0 choices, expected 1"},
	} {
		server := newAPI(t)
		server.intercept = func(w http.ResponseWriter, _ int64) bool {
			w.WriteHeader(test.status)
			fmt.Fprint(w, test.body)
			return true
		}
		p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base", Concurrency: 1})
		if err != nil {
			t.Fatal(err)
		}
		err = p.Run(t.Context(), ask(10), func(Prediction) error { return nil })
		if err == nil || err.Error() != test.want {
			t.Errorf("%s: error %v, want %s", name, err, test.want)
		}
	}
}

func TestPromptTooLongIsThatRowsError(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	questions := ask(3)
	questions[1].Text = "endless"
	p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base"})
	if err != nil {
		t.Fatal(err)
	}
	var got []Prediction
	if err := p.Run(t.Context(), questions, func(p Prediction) error { got = append(got, p); return nil }); err != nil {
		t.Fatal(err)
	}
	if got[0].Answer != "A" || got[1].Answer != "" || got[1].Err == nil || got[2].Answer != "C" {
		t.Errorf("predictions %+v", got)
	}
}

func TestNewPredictorTemplates(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	server.template = "Q {question} {a}{b}{c}{d}"
	c := New(server.URL+"/v1", "")
	const other = "{question}|{a}|{b}|{c}|{d}"
	for _, test := range []struct {
		model, template, want string
		warn                  bool
	}{
		{"base", "", DefaultTemplate, false},
		{"base", other, other, false},
		{"ft:base:local:x:1", "", server.template, false},
		{"ft:base:local:x:1", server.template, server.template, false},
		{"ft:base:local:x:1", other, other, true},
	} {
		p, err := c.NewPredictor(t.Context(), PredictorOptions{Model: test.model, Template: test.template})
		if err != nil {
			t.Fatal(err)
		}
		if p.Template() != test.want || (p.Warning != "") != test.warn {
			t.Errorf("%s with %q: template %q, warning %q", test.model, test.template, p.Template(), p.Warning)
		}
	}
	if _, err := c.NewPredictor(t.Context(), PredictorOptions{Model: "none"}); err == nil || err.Error() != `model "none": the model 'none' does not exist (HTTP 404)` {
		t.Errorf("unknown model: %v", err)
	}
	if _, err := c.NewPredictor(t.Context(), PredictorOptions{Model: "base", Template: "{question} {A}"}); err == nil {
		t.Error("a template without options was accepted")
	}
	if err := CheckTemplate(DefaultTemplate + "{answer}"); err == nil {
		t.Error("{answer} was accepted")
	}
	c.http.CloseIdleConnections()
}

func TestServerAway(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	server.Close()
	_, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base", RetryFor: time.Millisecond})
	if err == nil || !strings.HasSuffix(err.Error(), "is `hone serve` running there?") {
		t.Errorf("error %v", err)
	}
}

// predictTo runs like the command does, but stops after `rows` rows as if it were interrupted.
func predictTo(t *testing.T, p *Predictor, path string, questions []Question, details bool, rows int) error {
	t.Helper()
	s, err := OpenSubmission(path, NewOrigin(p, []byte("file"), len(questions), details), questions, false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	written := 0
	err = p.Run(ctx, questions[len(s.Done()):], func(p Prediction) error {
		if written == rows {
			return context.Canceled
		}
		written++
		return s.Write(p)
	})
	return errors.Join(err, s.Close())
}

func TestSubmissionResumes(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base"})
	if err != nil {
		t.Fatal(err)
	}
	questions := ask(6)
	questions[4].ID = "with, comma"
	for _, details := range []bool{false, true} {
		whole := filepath.Join(t.TempDir(), "whole.csv")
		if err := predictTo(t, p, whole, questions, details, 99); err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(whole)
		if err != nil {
			t.Fatal(err)
		}
		if !details && string(want) != "ID,Answer\n100,A\n101,B\n102,C\n103,D\n\"with, comma\",A\n105,B\n" {
			t.Errorf("submission %q", want)
		}
		if details && !strings.HasPrefix(string(want), "ID,Answer,P(A),P(B),P(C),P(D),Confidence\n100,A,0.700000,0.100000,0.100000,0.100000,0.700000\n") {
			t.Errorf("submission %q", want)
		}
		if err := predictTo(t, p, whole, questions, details, 99); !errors.Is(err, ErrComplete) {
			t.Errorf("complete file: %v", err)
		}
		// Interrupted at every row, and then at every byte of what was written.
		path := filepath.Join(t.TempDir(), "s.csv")
		if err := predictTo(t, p, path, questions, details, 2); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		before := server.chats.Load()
		if err := predictTo(t, p, path, questions, details, 99); err != nil {
			t.Fatal(err)
		}
		if asked := server.chats.Load() - before; asked != 4 {
			t.Errorf("resumed run asked %d questions, want the 4 that were left", asked)
		}
		compare(t, path, want)
		for cut := range want {
			if err := os.WriteFile(path, want[:cut], 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := OpenSubmission(path, NewOrigin(p, []byte("file"), 6, details), questions, false)
			if err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
			for i := len(s.Done()); i < 6; i++ {
				if err := s.Write(prediction(questions[i], i%4)); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			compare(t, path, want)
		}
	}
}

func prediction(q Question, right int) Prediction {
	p := Prediction{Question: q, Answer: Choices[right], Probabilities: [4]float64{0.1, 0.1, 0.1, 0.1}, Confidence: 0.7}
	p.Probabilities[right] = 0.7
	return p
}

func compare(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Fatalf("%s (-want +got)\n%s", path, diff)
	}
}

func TestSubmissionRefuses(t *testing.T) {
	t.Parallel()
	server := newAPI(t)
	p, err := New(server.URL+"/v1", "").NewPredictor(t.Context(), PredictorOptions{Model: "base"})
	if err != nil {
		t.Fatal(err)
	}
	questions := ask(3)
	origin := NewOrigin(p, []byte("file"), 3, false)
	path := filepath.Join(t.TempDir(), "s.csv")
	if err := predictTo(t, p, path, questions, false, 2); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	kept, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(o *Origin){
		"model other, now base":          func(o *Origin) { o.Model = "other" },
		"another file of the model base": func(o *Origin) { o.ModelDigest = "d0" },
		"other questions":                func(o *Origin) { o.QuestionsSHA256 = "0" },
		"another template":               func(o *Origin) { o.TemplateSHA256 = "0" },
		"with and without details":       func(o *Origin) { o.Details = true },
	} {
		before := origin
		change(&before)
		data, err := json.Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path+".hone.json", data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenSubmission(path, origin, questions, false); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	compare(t, path, kept)
	data, err := json.Marshal(origin)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".hone.json", data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, foreign := range []string{"Id,Answer\n", "ID,Answer\n101,A\n", "ID,Answer\n100,A,B\n", "ID,Answer\n100,A\n101,B\n102,C\n103,D\n", "ID,Answer\n\"1\"0,A\n101,B\n"} {
		if err := os.WriteFile(path, []byte(foreign), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenSubmission(path, origin, questions, false); !errors.Is(err, ErrForeign) {
			t.Errorf("%q: error %v", foreign, err)
		}
	}
	if err := os.Remove(path + ".hone.json"); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSubmission(path, origin, questions, false); !errors.Is(err, ErrForeign) {
		t.Errorf("no sidecar: error %v", err)
	}
	s, err := OpenSubmission(path, origin, questions, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	compare(t, path, []byte("ID,Answer\n"))
}
