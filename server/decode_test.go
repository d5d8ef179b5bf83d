package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

func TestDecodeErrors(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ body, param, message string }{
		{``, "", "the body is empty"},
		{`{"model": "smol", }`, "", "not valid JSON: invalid character '}' looking for beginning of object key string (byte 19, line 1, column 19)"},
		{"{\n \"model\": nul }", "", "line 2, column 14)"},
		{`{"model": "smol"`, "", "not valid JSON: unexpected end of JSON input (byte 16"},
		{`{} {}`, "", "not valid JSON"},
		{`[1]`, "", "expected a JSON object as the body, not an array"},
		{`null`, "", "expected a JSON object as the body, not null"},
		{`"x"`, "", "expected a JSON object as the body, not a string"},
		{`{"temperature":"hot"}`, "temperature", "temperature: expected a number, not a string"},
		{`{"max_tokens":1.5}`, "max_tokens", "max_tokens: expected an integer, not the number 1.5"},
		{`{"max_tokens":99999999999999999999}`, "max_tokens", "max_tokens: expected an integer"},
		{`{"temperature":1e999}`, "temperature", "temperature: expected a number"},
		{`{"stream":"yes"}`, "stream", "stream: expected true or false, not a string"},
		{`{"messages":"hi"}`, "messages", "messages: expected an array, not a string"},
		{`{"messages":[{"role":"user","content":"a"},{"role":5}]}`, "messages[1].role", "messages[1].role: expected a string, not the number 5"},
		{`{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}`, "messages[0].content[0]", `part of type "image_url" is not supported`},
		{`{"stop":[1]}`, "stop[0]", "stop[0]: expected a string or an array of strings"},
		{`{"guided_choice":["A",2]}`, "guided_choice[1]", "guided_choice[1]: expected a string, not the number 2"},
		{`{"stream_options":{"include_usage":1}}`, "stream_options.include_usage", "expected true or false, not the number 1"},
	} {
		err := decodeJSON([]byte(test.body), new(wire.ChatCompletionRequest))
		got := new(wire.Error)
		if !errors.As(err, &got) {
			t.Errorf("%s: %v, want a *wire.Error", test.body, err)
			continue
		}
		param := ""
		if got.Param != nil {
			param = *got.Param
		}
		if got.Status != 400 || param != test.param || !strings.Contains(got.Message, test.message) {
			t.Errorf("%s: %d, param %q, %q\nwant param %q, message with %q", test.body, got.Status, param, got.Message, test.param, test.message)
		}
	}
	if err := decodeJSON([]byte(`{"model":"m","temperature":null,"stop":null,"messages":null,"unknown":1}`), new(wire.ChatCompletionRequest)); err != nil {
		t.Errorf("nulls and unknown fields: %v", err)
	}
}

func TestRefusedFields(t *testing.T) {
	t.Parallel()
	for body, param := range map[string]string{
		`{"functions":[{}]}`:                            "functions",
		`{"function_call":"auto"}`:                      "function_call",
		`{"audio":{}}`:                                  "audio",
		`{"modalities":["text","audio"]}`:               "modalities",
		`{"prediction":{}}`:                             "prediction",
		`{"web_search_options":{}}`:                     "web_search_options",
		`{"verbosity":"low"}`:                           "verbosity",
		`{"suffix":"x"}`:                                "suffix",
		`{"chat_template":"{{ x }}"}`:                   "chat_template",
		`{"chat_template_kwargs":{"date":"x"}}`:         "chat_template_kwargs.date",
		`{"enable_thinking":false}`:                     "enable_thinking",
		`{"repeat_penalty":1.1}`:                        "repeat_penalty",
		`{"stop_token_ids":[2]}`:                        "stop_token_ids",
		`{"use_beam_search":true}`:                      "use_beam_search",
		`{"lora":[{"id":0}]}`:                           "lora",
		`{"json_schema":{}}`:                            "json_schema",
		`{"structured_outputs":{"structural_tag":"x"}}`: "structured_outputs.structural_tag",
		`{"structured_outputs":{"regex":"a","whitespace_pattern":" "}}`:    "structured_outputs.whitespace_pattern",
		`{"structured_outputs":{"json":{},"disable_any_whitespace":true}}`: "structured_outputs.disable_any_whitespace",
		`{"response_format":{"type":"structural_tag","structures":[]}}`:    "response_format.structures",
		`{"guided_decoding_backend":"xgrammar"}`:                           "guided_decoding_backend",
		`{"guided_whitespace_pattern":" "}`:                                "guided_whitespace_pattern",
		`{"grammar_lazy":true}`:                                            "grammar_lazy",
		`{"regex":"a"}`:                                                    "regex",
		`{"ebnf":"a"}`:                                                     "ebnf",
		`{"allowed_token_ids":[1]}`:                                        "allowed_token_ids",
		`{"bad_words":["a"]}`:                                              "bad_words",
		`{"Guided_Regex":"a"}`:                                             "Guided_Regex",

		`{"tools":null,"tool_choice":"none","functions":[],"response_format":{ "type": "text" },"logit_bias":{}}`:                            "",
		`{"n":1,"presence_penalty":0,"frequency_penalty":0.0,"modalities":["text"],"parallel_tool_calls":true,"guided_json":null}`:           "",
		`{"user":"u","metadata":{"a":"b"},"store":true,"service_tier":"auto","safety_identifier":"x","prompt_cache_key":"k","whatever":[1]}`: "",
		`{"guided_choice":["A","B"],"verbosity":"medium","top_k":4,"structured_outputs":{"choice":["a"],"disable_fallback":false}}`:          "",
		`{"guided_json":{},"guided_regex":"a","guided_grammar":"a","grammar":"a","chat_template_kwargs":{"enable_thinking":false}}`:          "",
	} {
		var fields map[string]json.RawMessage
		if err := json.Unmarshal([]byte(body), &fields); err != nil {
			t.Fatal(err)
		}
		err := refuseUnavailable(fields)
		refused := new(wire.Error)
		switch {
		case param == "" && err != nil:
			t.Errorf("%s: %v", body, err)
		case param != "" && (!errors.As(err, &refused) || *refused.Param != param || refused.Status != 400 || !strings.Contains(refused.Message, param)):
			t.Errorf("%s: %v, want a 400 for %s", body, err, param)
		}
	}
}

func TestErrorTable(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err         error
		status      int
		kind, code  string
		param, text string
	}{
		{invalid("x", "bad x"), 400, wire.ErrorTypeInvalidRequest, "", "x", "bad x"},
		{&finetune.InvalidError{Param: "model", Code: "model_not_found", Message: "no"}, 400, wire.ErrorTypeInvalidRequest, "model_not_found", "model", "no"},
		{&finetune.ConflictError{Message: "is succeeded"}, 409, wire.ErrorTypeInvalidRequest, "conflict", "", "is succeeded"},
		{finetune.ErrNotFound, 404, wire.ErrorTypeInvalidRequest, "not_found", "", "no such fine-tuning job"},
		{finetune.ErrUnknownModel, 404, wire.ErrorTypeInvalidRequest, "model_not_found", "", "no such base model"},
		{finetune.ErrStopping, 503, wire.ErrorTypeServer, "shutting_down", "", "stopping"},
		{adapters.ErrNotFound, 404, wire.ErrorTypeInvalidRequest, "model_not_found", "", "no such adapter"},
		{&adapters.BaseMismatchError{Adapter: "ft:a", BaseModel: "a"}, 409, wire.ErrorTypeInvalidRequest, "base_model_changed", "", "was trained on a"},
		{store.ErrNotFound, 404, wire.ErrorTypeInvalidRequest, "not_found", "", "not found"},
		{&store.AdapterInUseError{Adapter: "ft:a", JobID: "ftjob-1"}, 409, wire.ErrorTypeInvalidRequest, "model_in_use", "", "ftjob-1"},
		{&store.FileInUseError{FileID: "file-1", JobID: "ftjob-1"}, 409, wire.ErrorTypeInvalidRequest, "file_in_use", "", "ftjob-1"},
		{child.ErrStopping, 503, wire.ErrorTypeServer, "shutting_down", "", "stopping"},
		{child.ErrEnded, 500, wire.ErrorTypeServer, "runner_ended", "", "the next request starts it again"},
		{&child.ExitError{Name: "runner", Code: 2, Stderr: []string{"secret"}}, 500, wire.ErrorTypeServer, "runner_ended", "", "the next request starts it again"},
		{&child.Error{Code: child.CodeContextLength, Message: "too long"}, 400, wire.ErrorTypeInvalidRequest, "context_length_exceeded", "messages", "too long"},
		{&child.Error{Code: child.CodeInvalidRequest, Message: "roles", Param: "messages"}, 400, wire.ErrorTypeInvalidRequest, "", "messages", "roles"},
		{&child.Error{Code: child.CodeInvalidModel, Message: "bad magic"}, 400, wire.ErrorTypeInvalidRequest, "invalid_model", "model", "bad magic"},
		{&child.Error{Code: child.CodeInvalidAdapter, Message: "rank"}, 400, wire.ErrorTypeInvalidRequest, "invalid_adapter", "model", "rank"},
		{&child.Error{Code: child.CodeInternal, Message: "decode returned 1"}, 500, wire.ErrorTypeServer, "", "", "decode returned 1"},
		{&child.Error{Code: child.CodeOverloaded, Message: "256 wait"}, 429, wire.ErrorTypeRateLimit, "rate_limit_exceeded", "", "256 wait"},
		{&child.Error{Code: child.CodeEndsEngine, Message: "ended it three times"}, 400, wire.ErrorTypeInvalidRequest, "ends_engine", "", "three times"},
		{&child.Error{Code: child.CodeInsufficientMemory, Message: "8 of 4 GiB"}, 503, wire.ErrorTypeServer, "insufficient_memory", "model", "8 of 4 GiB"},
		{&child.UnavailableError{Reason: child.ErrLoading, Message: "is loading"}, 503, wire.ErrorTypeServer, "model_loading", "model", "is loading"},
		{&child.UnavailableError{Reason: child.ErrNoMemory, Message: "no room"}, 503, wire.ErrorTypeServer, "insufficient_memory", "model", "no room"},
		{&child.UnavailableError{Reason: child.ErrBackOff, Message: "does not start"}, 503, wire.ErrorTypeServer, "model_unavailable", "model", "does not start"},
		{context.Canceled, 499, wire.ErrorTypeInvalidRequest, "", "", "closed"},
		{context.DeadlineExceeded, 504, wire.ErrorTypeServer, "timeout", "", "deadline"},
		{errors.New("secret"), 500, wire.ErrorTypeServer, "", "", "x-request-id"},
	} {
		for _, err := range []error{test.err, fmt.Errorf("wrapped: %w", test.err)} {
			got := errorFor(err)
			deref := func(s *string) string {
				if s == nil {
					return ""
				}
				return *s
			}
			if got.Status != test.status || got.Type != test.kind || deref(got.Code) != test.code || deref(got.Param) != test.param || !strings.Contains(got.Message, test.text) {
				t.Errorf("%v: got %+v (code %q, param %q), want %+v", err, got, deref(got.Code), deref(got.Param), test)
			}
			if strings.Contains(got.Message, "secret") {
				t.Errorf("%v: the message tells what is only for the log: %s", err, got.Message)
			}
		}
	}
}

func TestBodyTooLarge(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	status, body := r.do(t, http.MethodPost, "/v1/chat/completions", `{"user":"`+strings.Repeat("x", maxBodyBytes)+`"}`)
	wantError(t, "32 MiB and more", status, body, 413, "", "request_too_large", "longer than 32 MiB")
	status, body = r.do(t, http.MethodPost, "/v1/chat/completions", "{}", "Content-Encoding", "gzip")
	wantError(t, "compressed", status, body, 415, "", "unsupported_media_type", "uncompressed")
	file, contentType := form([3]string{"purpose", "", "batch"}, [3]string{"file", "a", "x"})
	status, body = r.do(t, http.MethodPost, "/v1/files", file, "Content-Type", contentType, "Content-Encoding", "gzip")
	wantError(t, "a compressed form", status, body, 415, "", "unsupported_media_type", "uncompressed")
	status, body = r.do(t, http.MethodPost, "/v1/chat/completions", "{}", "Content-Type", "multipart/form-data; boundary=x")
	wantError(t, "form", status, body, 415, "", "unsupported_media_type", "expected a JSON body")
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for word, want := range map[string]string{"busy": "1", "loading": "2", "die": ""} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.URL+"/v1/chat/completions",
			strings.NewReader(`{"model":"smol","messages":[{"role":"user","content":"`+word+`"}]}`))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := r.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Retry-After"); got != want || !strings.HasPrefix(resp.Header.Get("X-Request-Id"), "req_") {
			t.Errorf("%s: Retry-After %q, want %q", word, got, want)
		}
	}
}

// TestOddValues puts values that no field expects into every field. Whatever comes of it, it is neither a failure nor a
// request to the runner that is out of bounds.
func TestOddValues(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	values := []string{
		`null`, `true`, `false`, `0`, `-0`, `-1`, `1`, `1.5`, `-2147483649`, `2147483648`, `9223372036854775808`, `1e308`, `-1e308`, `1e-308`, `1e999`,
		`""`, `"x"`, `"NaN"`, `"\u0000"`, `"\ud800"`, `[]`, `[null]`, `[[]]`, `[{}]`, `[1]`, `[-1]`, `["a","b"]`, `["\u0000","b"]`, `{}`, `{"a":1}`, `{"1":1}`, `{"type":"function"}`,
		`{"type":"json_schema"}`, `{"type":"json_schema","json_schema":null}`, `{"type":"json_schema","json_schema":{"schema":null}}`, `[{"type":"function","function":null}]`,
		`[{"role":"user","content":"x","tool_calls":[null]}]`, `[{"role":"assistant","tool_calls":[{}]}]`, `[null,null]`, `{"json":null,"choice":[]}`,
		`[{"type":"choice","instructions":"?","choices":[null,null]}]`, `[{"type":"score","instructions":"?","levels":[{},{}]}]`,
		strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000), strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000),
	}
	for path, test := range map[string]struct {
		base   map[string]string
		fields reflect.Type
	}{
		"/v1/chat/completions": {map[string]string{"model": `"smol"`, "messages": `[{"role":"user","content":"a b"}]`}, reflect.TypeFor[wire.ChatCompletionRequest]()},
		"/v1/completions":      {map[string]string{"model": `"smol"`, "prompt": `"a b"`}, reflect.TypeFor[wire.CompletionRequest]()},
		"/v1/embeddings":       {map[string]string{"model": `"smol"`, "input": `"a b"`}, reflect.TypeFor[wire.EmbeddingRequest]()},
		"/v1/tokenize":         {map[string]string{"model": `"smol"`, "prompt": `"a b"`}, reflect.TypeFor[wire.TokenizeRequest]()},
		"/v1/detokenize":       {map[string]string{"model": `"smol"`, "tokens": `[1]`}, reflect.TypeFor[wire.DetokenizeRequest]()},
		"/v1/decisions":        {map[string]string{"model": `"smol"`, "input": `"a b"`, "questions": `[{"type":"predicate","instructions":"?"}]`}, reflect.TypeFor[wire.DecisionRequest]()},
	} {
		for _, field := range reflect.VisibleFields(test.fields) {
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			if name == "" {
				continue // an embedded struct; its fields come by themselves
			}
			for _, value := range values {
				body := "{" + strconv.Quote(name) + ":" + value
				for other, v := range test.base {
					if other != name {
						body += "," + strconv.Quote(other) + ":" + v
					}
				}
				status, answer := r.do(t, http.MethodPost, path, body+"}")
				if status != 200 && status != 400 && (name != "model" || status != 404) {
					t.Errorf("%s %s=%.60s: %d %.300s", path, name, value, status, answer)
				}
			}
		}
	}
	for _, req := range r.echo.requests {
		if req.N < 0 || req.N > maxCompletions || req.MaxTokens < 0 || req.MinTokens < 0 || req.TopK < 0 || req.Temperature < 0 || req.Temperature > maxTemperature ||
			req.TopP <= 0 || req.TopP > 1 || req.TopLogProbs < 0 || req.TopLogProbs > maxTopLogProbs || len(req.Stop) > maxStops {
			t.Errorf("the runner was asked for %+v", req)
		}
	}
}
