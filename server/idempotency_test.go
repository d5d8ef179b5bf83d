package server

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
)

// idOf is the id of the object that an answer holds.
func idOf(t *testing.T, status int, body string) string {
	t.Helper()
	return decodeAs[struct {
		ID string `json:"id"`
	}](t, status, body).ID
}

// TestIdempotency sends each request that makes something twice with one key, and then another with it.
func TestIdempotency(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	upload := func(name, content, boundary string) (body, contentType string) {
		body, contentType = form([3]string{"purpose", "", "fine-tune"}, [3]string{"file", name, content})
		return strings.ReplaceAll(body, "xxBOUNDARYxx", boundary), strings.ReplaceAll(contentType, "xxBOUNDARYxx", boundary)
	}
	const rows = `{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}` + "\n"
	body, contentType := upload("a.jsonl", strings.Repeat(rows, 10), "one")
	again, againType := upload("a.jsonl", strings.Repeat(rows, 10), "two")
	other, otherType := upload("a.jsonl", strings.Repeat(rows, 11), "one")
	status, answer := r.do(t, "POST", "/v1/files", body, "Content-Type", contentType)
	file := idOf(t, status, answer)
	requests, requestsType := form([3]string{"purpose", "", "batch"}, [3]string{"file", "b.jsonl", `{"custom_id":"1","method":"POST","url":"/v1/chat/completions","body":{"model":"smol","messages":[]}}`})
	status, answer = r.do(t, "POST", "/v1/files", requests, "Content-Type", requestsType)
	input := idOf(t, status, answer)
	const aJSON = "application/json"
	newUpload := `{"filename":"a.jsonl","purpose":"batch","bytes":%d,"mime_type":"text/jsonl"}`
	status, answer = r.do(t, "POST", "/v1/uploads", fmt.Sprintf(newUpload, 5), "Content-Type", aJSON)
	parts := "/v1/uploads/" + idOf(t, status, answer)
	part, partType := form([3]string{"data", "blob", "hello"})
	otherPart, _ := form([3]string{"data", "blob", "world"})
	status, answer = r.do(t, "POST", parts+"/parts", part, "Content-Type", partType)
	complete := fmt.Sprintf(`{"part_ids":[%q]}`, idOf(t, status, answer))

	for _, test := range []struct{ path, body, contentType, again, againType, other, otherType string }{
		{"/v1/files", body, contentType, again, againType, other, otherType},
		{"/v1/uploads", fmt.Sprintf(newUpload, 7), aJSON, fmt.Sprintf(newUpload, 7), aJSON, fmt.Sprintf(newUpload, 8), aJSON},
		{parts + "/parts", part, partType, part, partType, otherPart, partType},
		{parts + "/complete", complete, aJSON, complete, aJSON, `{"part_ids":["part_1"]}`, aJSON},
		{"/v1/batches", fmt.Sprintf(`{"input_file_id":%q,"endpoint":"/v1/chat/completions","completion_window":"24h"}`, input), aJSON,
			fmt.Sprintf(`{"input_file_id":%q,"endpoint":"/v1/chat/completions","completion_window":"24h"}`, input), aJSON,
			fmt.Sprintf(`{"input_file_id":%q,"endpoint":"/v1/chat/completions","completion_window":"24h","metadata":{"a":"b"}}`, input), aJSON},
		{"/v1/fine_tuning/jobs", fmt.Sprintf(`{"model":"smol","training_file":%q}`, file), aJSON,
			fmt.Sprintf(`{"model":"smol","training_file":%q}`, file), aJSON, fmt.Sprintf(`{"model":"smol","training_file":%q,"seed":2}`, file), aJSON},
	} {
		send := func(body, contentType, key, sender string) (int, string, http.Header) {
			t.Helper()
			req, err := http.NewRequestWithContext(t.Context(), "POST", r.URL+test.path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header = http.Header{"Content-Type": {contentType}, "Idempotency-Key": {key}, "Authorization": {"Bearer " + sender}}
			resp, err := r.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var answer json.RawMessage
			if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, string(answer), resp.Header
		}
		key := "a key for " + test.path
		status, answer, header := send(test.body, test.contentType, key, "me")
		id := idOf(t, status, answer)
		if id == "" || header.Get("Idempotent-Replayed") != "" {
			t.Errorf("%s: %s %v", test.path, answer, header)
		}
		status, answer, header = send(test.again, test.againType, key, "me")
		if again := idOf(t, status, answer); again != id || header.Get("Idempotent-Replayed") != "true" {
			t.Errorf("%s again: %s %v; it had made %s", test.path, answer, header, id)
		}
		status, answer, _ = send(test.other, test.otherType, key, "me")
		wantError(t, test.path, status, answer, http.StatusUnprocessableEntity, "", "idempotency_key_reused", "new key")
		if strings.HasSuffix(test.path, "/complete") {
			continue // it cannot be completed again
		}
		if status, answer, _ = send(test.body, test.contentType, key, "somebody else"); idOf(t, status, answer) == id {
			t.Errorf("%s: somebody else's key answers %s", test.path, id)
		}
	}
	status, answer = r.do(t, "POST", "/v1/files", body, "Content-Type", contentType, "Idempotency-Key", "gone")
	id := idOf(t, status, answer)
	r.do(t, "DELETE", "/v1/files/"+id, "")
	status, answer = r.do(t, "POST", "/v1/files", body, "Content-Type", contentType, "Idempotency-Key", "gone")
	wantError(t, "a file that was deleted", status, answer, http.StatusNotFound, "", "not_found", id)
	status, answer = r.do(t, "POST", "/v1/uploads", `{}`, "Content-Type", aJSON, "Idempotency-Key", "refused")
	wantError(t, "a refused request", status, answer, http.StatusBadRequest, "filename", "", "required")
	status, answer = r.do(t, "POST", "/v1/uploads", fmt.Sprintf(newUpload, 7), "Content-Type", aJSON, "Idempotency-Key", "refused")
	idOf(t, status, answer) // its key was free
	for _, key := range []string{strings.Repeat("k", 256), "键"} {
		status, answer = r.do(t, "POST", "/v1/uploads", fmt.Sprintf(newUpload, 7), "Content-Type", aJSON, "Idempotency-Key", key)
		wantError(t, key, status, answer, http.StatusBadRequest, "", "", "printable ASCII")
	}
}

// TestIdempotencyInUse sends a request whose key another one has that is not read to its end yet.
func TestIdempotencyInUse(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	body, contentType := form([3]string{"purpose", "", "batch"}, [3]string{"file", "a.jsonl", "x"})
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", r.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nIdempotency-Key: one\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", contentType, len(body))
	reader := bufio.NewReader(conn)
	for _, want := range []string{"HTTP/1.1 100 Continue\r\n", "\r\n"} { // comes when the body is read
		if line, err := reader.ReadString('\n'); err != nil || line != want {
			t.Fatalf("%q, %v; expected %q", line, err, want)
		}
	}
	status, answer := r.do(t, "POST", "/v1/files", body, "Content-Type", contentType, "Idempotency-Key", "one")
	wantError(t, "a key in use", status, answer, http.StatusConflict, "", "idempotency_key_in_use", "not answered yet")
	fmt.Fprint(conn, body)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var first struct{ ID string }
	if err := json.NewDecoder(resp.Body).Decode(&first); err != nil {
		t.Fatal(err)
	}
	status, answer = r.do(t, "POST", "/v1/files", body, "Content-Type", contentType, "Idempotency-Key", "one")
	if id := idOf(t, status, answer); id != first.ID || id == "" {
		t.Errorf("after it %s, before it %s", id, first.ID)
	}
}

// TestPickles sends files that are code for whoever unpickles them.
func TestPickles(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	archive := "PK\x03\x04" + strings.Repeat(" ", 40000) + "data.pkl"
	for name, content := range map[string]string{"a.PT": "x", "model.bin. ": "x", "a.jsonl": "\x80\x04x", "b.jsonl": archive} {
		body, contentType := form([3]string{"purpose", "", "fine-tune"}, [3]string{"file", name, content})
		status, answer := r.do(t, "POST", "/v1/files", body, "Content-Type", contentType)
		if name == "a.PT" || name == "model.bin. " {
			wantError(t, name, status, answer, http.StatusUnsupportedMediaType, "file", "unsupported_media_type", "are code")
		} else {
			wantError(t, name, status, answer, http.StatusUnsupportedMediaType, "", "unsupported_media_type", "is code")
		}
	}
	body, contentType := form([3]string{"purpose", "", "fine-tune"}, [3]string{"file", "a.zip", "PK\x03\x04 readme.txt"})
	if status, answer := r.do(t, "POST", "/v1/files", body, "Content-Type", contentType); status != http.StatusOK {
		t.Errorf("another archive: %d %s", status, answer)
	}
	status, answer := r.do(t, "POST", "/v1/uploads", `{"filename":"a.ckpt","purpose":"batch","bytes":5,"mime_type":"text/plain"}`, "Content-Type", "application/json")
	wantError(t, "an upload", status, answer, http.StatusUnsupportedMediaType, "filename", "unsupported_media_type", "are code")
}
