package wire

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMessageContent(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		json, want, wantErr string
	}{
		{json: `{"role":"user","content":"hi"}`, want: "hi"},
		{json: `{"role":"assistant","content":null}`, want: ""},
		{json: `{"role":"user"}`, want: ""},
		{json: `{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}`, want: "ab"},
		{json: `{"role":"user","content":[{"type":"image_url"}]}`, wantErr: `content[0]: part of type "image_url" is not supported, only text`},
		{json: `{"role":"user","content":5}`, wantErr: `content must be a string or an array of text parts, not 5`},
	} {
		var m Message
		err := json.Unmarshal([]byte(test.json), &m)
		switch {
		case test.wantErr != "":
			if err == nil || err.Error() != test.wantErr {
				t.Errorf("%s: error %v, want %s", test.json, err, test.wantErr)
			}
		case err != nil:
			t.Errorf("%s: %v", test.json, err)
		case m.Content != test.want:
			t.Errorf("%s: content %q, want %q", test.json, m.Content, test.want)
		}
	}
}

func TestAuto(t *testing.T) {
	t.Parallel()
	var got Hyperparameters
	if err := json.Unmarshal([]byte(`{"batch_size":"auto","n_epochs":3,"learning_rate_multiplier":0.5}`), &got); err != nil {
		t.Fatal(err)
	}
	want := Hyperparameters{BatchSize: &Auto[int]{}, NEpochs: Number(3), LearningRateMultiplier: Number(0.5)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	out, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"batch_size":"auto","learning_rate_multiplier":0.5,"n_epochs":3}`; string(out) != want {
		t.Errorf("written as %s, want %s", out, want)
	}
	for _, bad := range []string{`{"n_epochs":"three"}`, `{"n_epochs":1.5}`, `{"batch_size":true}`} {
		if err := json.Unmarshal([]byte(bad), new(Hyperparameters)); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

// TestSafeOutput checks the shapes that OpenAI's clients break on when they differ.
func TestSafeOutput(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		value any
		want  string
	}{
		{"error first, no space, all keys", ErrorResponse{&Error{Status: 400, Message: "m", Type: ErrorTypeInvalidRequest}},
			`{"error":{"message":"m","type":"invalid_request_error","param":null,"code":null}}`},
		{"healthy job", FineTuningJob{ID: "ftjob-1", Object: "fine_tuning.job", ResultFiles: []string{}},
			`{"id":"ftjob-1","object":"fine_tuning.job","created_at":0,"finished_at":null,"model":"","fine_tuned_model":null,` +
				`"organization_id":"","status":"","hyperparameters":{},"training_file":"","validation_file":null,"result_files":[],` +
				`"trained_tokens":null,"error":null,"seed":0,"estimated_finish":null,"integrations":null}`},
		{"first chunk, usage wanted", ChatCompletionChunk{Choices: []ChunkChoice{{Delta: ChatDelta{Role: "assistant", Content: NewNullable("")}}}, Usage: Nullable[Usage]{Set: true}},
			`{"id":"","object":"","created":0,"model":"","system_fingerprint":"","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}`},
		{"last chunk, no usage", ChatCompletionChunk{Choices: []ChunkChoice{{FinishReason: "stop"}}},
			`{"id":"","object":"","created":0,"model":"","system_fingerprint":"","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}`},
		{"empty list", List[File]{Object: "list", Data: []File{}},
			`{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}`},
	} {
		got, err := json.Marshal(test.value)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(test.want, string(got)); diff != "" {
			t.Errorf("%s (-want +got)\n%s", test.name, diff)
		}
	}
}

func TestTexts(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]Texts{
		`"x"`: {{String: "x"}}, `["x","y"]`: {{String: "x"}, {String: "y"}}, `[1,2]`: {{Tokens: TokenIDs{1, 2}}}, `[[1],[2]]`: {{Tokens: TokenIDs{1}}, {Tokens: TokenIDs{2}}},
	} {
		var got Texts
		if err := json.Unmarshal([]byte(in), &got); err != nil || !cmp.Equal(got, want) {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for _, bad := range []string{`[null]`, `[1,null]`, `[[null]]`, `{}`, `5`, `[1.5]`} {
		if err := json.Unmarshal([]byte(bad), new(Texts)); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
	if err := json.Unmarshal([]byte(`{"tokens":[1,null]}`), new(DetokenizeRequest)); err == nil {
		t.Error("null among token ids was accepted")
	}
}

func TestStringList(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]StringList{`"x"`: {"x"}, `["x","y"]`: {"x", "y"}, `[]`: {}} {
		var got StringList
		if err := json.Unmarshal([]byte(in), &got); err != nil || !cmp.Equal(got, want) {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	if err := json.Unmarshal([]byte(`[1]`), new(StringList)); err == nil {
		t.Error("[1] was accepted")
	}
}
