package server

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/wire"
)

const decisionQuestions = `[{"type":"choice","name":"category","instructions":"Classify the ticket.","choices":[{"value":"billing"},{"value":"technical","description":"errors"},{"value":true}]},` +
	`{"type":"predicate","instructions":"The customer is angry."},` +
	`{"type":"score","name":"urgency","instructions":"How urgent is it?","levels":[{"label":"low"},{"label":"middle"},{"label":"high","description":"today"}]}]`

func TestDecisions(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	name := r.tuned(t, smolDigest)
	for model, input := range map[string]string{"smol": `"I was charged twice."`, name: `[{"role":"user","content":[{"type":"input_text","text":"I was"}]},{"role":"user","content":"charged twice."}]`} {
		status, body := r.do(t, "POST", "/v1/decisions", `{"model":"`+model+`","input":`+input+`,"questions":`+decisionQuestions+`}`)
		want := `{"model":"` + model + `","answers":[` +
			`{"type":"choice","name":"category","choice":"billing","probabilities":[{"value":"billing","probability":0.9},{"value":"technical","probability":0.05},{"value":true,"probability":0.05}],"confidence":0.9},` +
			`{"type":"predicate","name":null,"probability":0.9},` +
			`{"type":"score","name":"urgency","score":0.15000000000000002,"probabilities":[{"value":0,"label":"low","probability":0.9},{"value":1,"label":"middle","probability":0.05},{"value":2,"label":"high","probability":0.05}],"confidence":0.9}],` +
			`"usage":{"input_tokens":21,"input_tokens_details":{"cached_tokens":9,"cache_write_tokens":0},"output_tokens":3,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":24}}` + "\n"
		if diff := cmp.Diff(want, body); status != 200 || diff != "" {
			t.Errorf("%s: %d (-want +got)\n%s", model, status, diff)
		}
	}
	questions := map[string]int{}
	for _, req := range r.echo.requests {
		input, question, _ := strings.Cut(strings.Replace(req.Messages[0].Content, "I was\n\ncharged", "I was charged", 1), "\n\n")
		if input != "Text:\nI was charged twice." || req.Temperature != 0 || *req.EnableThinking {
			t.Errorf("request %+v", req)
		}
		questions[question]++
	}
	want := map[string]int{
		"Question: Classify the ticket.\nOptions:\n- billing\n- technical: errors\n- true\nAnswer with one of the options, and nothing else.":                    2,
		"Statement: The customer is angry.\nIs the statement true? Answer Yes or No.":                                                                            2,
		"Question: How urgent is it?\nLevels, from the lowest to the highest:\n- low\n- middle\n- high: today\nAnswer with one of the levels, and nothing else.": 2,
	}
	if diff := cmp.Diff(want, questions); diff != "" {
		t.Errorf("questions (-want +got)\n%s", diff)
	}
	if req, _ := r.echo.last(); req.Client != "addr:127.0.0.1" {
		t.Errorf("client %q", req.Client)
	}
}

func TestManyQuestions(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	request := wire.DecisionRequest{Model: "smol", Input: wire.DecisionInput{{Role: "user", Content: "x"}}}
	for i := range maxQuestions {
		name := fmt.Sprint(i)
		request.Questions = append(request.Questions, wire.DecisionQuestion{Type: "predicate", Name: &name, Instructions: "Is it " + name + "?"})
	}
	body, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	status, answer := r.do(t, "POST", "/v1/decisions", string(body))
	var decision wire.Decision
	if err := json.Unmarshal([]byte(answer), &decision); err != nil || status != 200 || len(decision.Answers) != maxQuestions {
		t.Fatalf("%d %.200s %v", status, answer, err)
	}
	for i, a := range decision.Answers {
		if *a.Predicate.Name != fmt.Sprint(i) {
			t.Fatalf("answer %d is called %s", i, *a.Predicate.Name)
		}
	}
	if r.echo.most > maxInFlight || len(r.echo.requests) != maxQuestions {
		t.Errorf("%d requests, %d at a time", len(r.echo.requests), r.echo.most)
	}
}

func TestDecisionRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const ask = `"questions":[{"type":"predicate","instructions":"?"}]`
	for _, test := range []struct{ fields, param, message string }{
		{ask, "input", "required"},
		{`"input":"",` + ask, "input", "required"},
		{`"input":[{"role":"assistant","content":"x"}],` + ask, "input[0].role", "expected user"},
		{`"input":[{"role":"user","content":[{"type":"input_image","image_url":"x"}]}],` + ask, "input[0].content[0]", "only text"},
		{`"input":"x"`, "questions", "expected 1 to 200"},
		{`"input":"x","questions":[` + strings.Repeat(`{},`, maxQuestions) + `{}]`, "questions", "expected 1 to 200"},
		{`"input":"x","questions":[{"type":"predicate"}]`, "questions[0].instructions", "expected 1"},
		{`"input":"x","questions":[{"type":"box","instructions":"?"}]`, "questions[0].type", `"box"`},
		{`"input":"x","questions":[{"type":"choice","instructions":"?","choices":[{"value":"a"}]}]`, "questions[0].choices", "expected 2 to 255"},
		{`"input":"x","questions":[{"type":"choice","instructions":"?","choices":[{"value":"a"},{"value":5}]}]`, "questions[0].choices[1].value", "a string, true or false"},
		{`"input":"x","questions":[{"type":"choice","instructions":"?","choices":[{"value":"true"},{"value":true}]}]`, "questions[0].choices[1]", "the same text"},
		{`"input":"x","questions":[{"type":"choice","instructions":"?","choices":[{"value":"a"},{"value":" "}]}]`, "questions[0].choices[1]", "expected 1"},
		{`"input":"x","questions":[{"type":"score","instructions":"?","levels":[{"label":"a"}]}]`, "questions[0].levels", "expected 2 to 10"},
	} {
		status, body := r.do(t, "POST", "/v1/decisions", `{"model":"smol",`+test.fields+`}`)
		wantError(t, test.fields[:min(100, len(test.fields))], status, body, 400, test.param, "", test.message)
	}
}
