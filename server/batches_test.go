package server

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/wire"
)

func (r *rig) batchFile(t *testing.T, content string) string {
	t.Helper()
	form, contentType := form([3]string{"purpose", "", "batch"}, [3]string{"file", "in.jsonl", content})
	status, body := r.do(t, "POST", "/v1/files", form, "Content-Type", contentType)
	return decodeAs[wire.File](t, status, body).ID
}

func (r *rig) createBatch(t *testing.T, file, endpoint string) wire.Batch {
	t.Helper()
	status, body := r.do(t, "POST", "/v1/batches", fmt.Sprintf(`{"input_file_id":%q,"endpoint":%q,"completion_window":"24h","metadata":{"k":"v"},
		"output_expires_after":{"anchor":"created_at","seconds":3600}}`, file, endpoint), "Content-Type", "application/json")
	return decodeAs[wire.Batch](t, status, body)
}

func (r *rig) awaitBatch(t *testing.T, id string) wire.Batch {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		status, body := r.do(t, "GET", "/v1/batches/"+id, "")
		b := decodeAs[wire.Batch](t, status, body)
		if b.CompletedAt != nil || b.FailedAt != nil || b.CancelledAt != nil {
			return b
		}
		if time.Now().After(deadline) {
			t.Fatalf("the batch stays %s", body)
		}
	}
}

// TestBatchAnswers asks the same of a batch and of the endpoints themselves.
func TestBatchAnswers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for endpoint, bodies := range map[string][]string{
		"/v1/chat/completions": {
			`{"model":"smol","messages":[{"role":"user","content":"hello <there> & 你好"}],"logprobs":true,"top_logprobs":2}`,
			`{"model":"smol","messages":[{"role":"user","content":"Which?"}],"guided_choice":["A","B"]}`,
			`{"model":"none","messages":[{"role":"user","content":"x"}]}`,
			`{"model":"smol","messages":[]}`,
			`{"model":"smol","messages":[{"role":"user","content":"toolong"}]}`,
			`{"model":"smol","messages":[{"role":"user","content":"x"}],"temperature":9}`,
		},
		"/v1/completions": {`{"model":"smol","prompt":["a b","c"],"max_tokens":5}`, `{"model":"smol","prompt":"a","max_tokens":-1}`},
		"/v1/embeddings":  {`{"model":"smol","input":["a","bcd"]}`, `{"model":"smol","input":[]}`},
	} {
		var input strings.Builder
		want := map[string]string{}
		for i, body := range bodies {
			id := fmt.Sprint(i)
			fmt.Fprintf(&input, `{"custom_id":%q,"method":"POST","url":%q,"body":%s}`+"\n", id, endpoint, body)
			status, answer := r.do(t, "POST", endpoint, body, "Content-Type", "application/json")
			want[id] = fmt.Sprint(status, " ", sameEveryTime(t, answer))
		}
		b := r.awaitBatch(t, r.createBatch(t, r.batchFile(t, input.String()), endpoint).ID)
		if b.Status != "completed" || b.RequestCounts.Total != len(bodies) || b.Usage == nil || b.Usage.InputTokens == 0 || b.Metadata["k"] != "v" {
			t.Errorf("batch %+v", b)
		}
		for _, file := range []*string{b.OutputFileID, b.ErrorFileID} {
			status, shown := r.do(t, "GET", "/v1/files/"+*file, "")
			if f := decodeAs[wire.File](t, status, shown); f.Purpose != "batch_output" || f.ExpiresAt == nil || !strings.HasSuffix(f.Filename, ".jsonl") {
				t.Errorf("file %+v", f)
			}
			_, content := r.do(t, "GET", "/v1/files/"+*file+"/content", "")
			for lines := bufio.NewScanner(strings.NewReader(content)); lines.Scan(); {
				var line struct {
					CustomID string `json:"custom_id"`
					Response struct {
						StatusCode int             `json:"status_code"`
						RequestID  string          `json:"request_id"`
						Body       json.RawMessage `json:"body"`
					} `json:"response"`
				}
				if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
					t.Fatal(err)
				}
				got := fmt.Sprint(line.Response.StatusCode, " ", sameEveryTime(t, string(line.Response.Body)))
				if got != want[line.CustomID] {
					t.Errorf("%s %s:\n got %s\nwant %s", endpoint, line.CustomID, got, want[line.CustomID])
				}
				if delete(want, line.CustomID); !strings.HasPrefix(line.Response.RequestID, "req_") {
					t.Errorf("no request id: %s", lines.Bytes())
				}
			}
		}
		if len(want) > 0 {
			t.Errorf("without an answer: %v", want)
		}
	}
	r.echo.mu.Lock()
	defer r.echo.mu.Unlock()
	clients := map[string]int{}
	for _, req := range r.echo.requests {
		clients[req.Client]++
		if req.Background != (req.Client == "addr:batch") {
			t.Errorf("a request of %s is of the background: %v", req.Client, req.Background)
		}
	}
	if clients["addr:batch"] == 0 || len(clients) != 2 {
		t.Errorf("the fair queue sees the clients %v", clients)
	}
}

// sameEveryTime is an answer without its id.
func sameEveryTime(t *testing.T, answer string) string {
	t.Helper()
	var object map[string]any
	if err := json.Unmarshal([]byte(answer), &object); err != nil {
		t.Fatalf("%s: %v", answer, err)
	}
	delete(object, "id")
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestBatchRequests(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := r.batchFile(t, "x")
	post := func(path, body string) (int, string) {
		return r.do(t, "POST", path, body, "Content-Type", "application/json")
	}
	for _, test := range []struct{ body, param, message string }{
		{`{"endpoint":"/v1/embeddings","completion_window":"24h"}`, "input_file_id", "required"},
		{`{"input_file_id":"file-none","endpoint":"/v1/embeddings","completion_window":"24h"}`, "input_file_id", "does not exist"},
		{`{"input_file_id":"` + r.upload(t) + `","endpoint":"/v1/embeddings","completion_window":"24h"}`, "input_file_id", "purpose fine-tune"},
		{`{"input_file_id":"` + file + `","endpoint":"/v1/responses","completion_window":"24h"}`, "endpoint", "expected one of /v1/chat/completions"},
		{`{"input_file_id":"` + file + `","endpoint":"/v1/embeddings","completion_window":"1h"}`, "completion_window", "expected 24h"},
		{`{"input_file_id":"` + file + `","endpoint":"/v1/embeddings","completion_window":"24h","output_expires_after":{"anchor":"created_at","seconds":1}}`, "output_expires_after.seconds", "3600"},
		{`{"input_file_id":"` + file + `","endpoint":"/v1/embeddings","completion_window":"24h","metadata":{"k":1}}`, "metadata.k", "expected a string"},
	} {
		status, body := post("/v1/batches", test.body)
		wantError(t, test.body, status, body, 400, test.param, "", test.message)
	}
	failed := r.awaitBatch(t, r.createBatch(t, file, "/v1/embeddings").ID)
	if failed.Status != "failed" || failed.Errors == nil || failed.Errors.Object != "list" || *failed.Errors.Data[0].Line != 1 || failed.Errors.Data[0].Code != "invalid_json_line" {
		t.Errorf("failed batch %+v", failed)
	}
	status, body := post("/v1/batches/"+failed.ID+"/cancel", "")
	wantError(t, "cancel of a failed batch", status, body, http.StatusConflict, "", "conflict", "is failed")
	for _, path := range []string{"/v1/batches/none", "/v1/batches/none/cancel"} {
		method := "GET"
		if strings.HasSuffix(path, "cancel") {
			method = "POST"
		}
		status, body := r.do(t, method, path, "")
		wantError(t, path, status, body, 404, "id", "not_found", "does not exist")
	}
	for query, param := range map[string]string{"limit=0": "limit", "limit=101": "limit", "after=none": "after"} {
		status, body := r.do(t, "GET", "/v1/batches?"+query, "")
		wantError(t, query, status, body, 400, param, "", param)
	}
	status, body = r.do(t, "GET", "/v1/batches", "")
	if list := decodeAs[wire.List[wire.Batch]](t, status, body); len(list.Data) != 1 || list.HasMore || *list.FirstID != failed.ID {
		t.Errorf("list %s", body)
	}
}
