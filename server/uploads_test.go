package server

import (
	"bufio"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/wire"
)

func decodeAs[T any](t *testing.T, status int, body string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(body), &v); err != nil || status != http.StatusOK {
		t.Fatalf("%d %s: %v", status, body, err)
	}
	return v
}

func TestUpload(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	create := func(fields string) (int, string) {
		return r.do(t, "POST", "/v1/uploads", fields, "Content-Type", "application/json")
	}
	const good = `"filename":"a.jsonl","purpose":"batch","bytes":10,"mime_type":"text/jsonl"`
	for _, test := range []struct{ fields, param, message string }{
		{`{"purpose":"batch","bytes":10,"mime_type":"text/jsonl"}`, "filename", "required"},
		{`{"filename":"..","purpose":"batch","bytes":0,"mime_type":"text/jsonl"}`, "bytes", "expected 1 to"},
		{`{"filename":"a","purpose":"batch","bytes":8589934593,"mime_type":"text/jsonl"}`, "bytes", "8 GiB"},
		{`{"filename":"a","purpose":"fine-tune-results","bytes":1,"mime_type":"text/jsonl"}`, "purpose", "files that the server writes"},
		{`{"filename":"a","purpose":"fun","bytes":1,"mime_type":"text/jsonl"}`, "purpose", "expected one of"},
		{`{"filename":"a","purpose":"batch","bytes":1,"mime_type":"jsonl"}`, "mime_type", "media type"},
		{`{` + good + `,"expires_after":{"anchor":"last_used","seconds":3600}}`, "expires_after.anchor", "created_at"},
		{`{` + good + `,"expires_after":{"anchor":"created_at","seconds":2592001}}`, "expires_after.seconds", "3600 to 2592000"},
	} {
		status, body := create(test.fields)
		wantError(t, test.fields, status, body, 400, test.param, "", test.message)
	}
	status, body := create(`{` + good + `,"expires_after":{"anchor":"created_at","seconds":7200}}`)
	upload := decodeAs[wire.Upload](t, status, body)
	if upload.Status != "pending" || upload.Object != "upload" || upload.File != nil || upload.Bytes != 10 || upload.ExpiresAt != upload.CreatedAt+3600 {
		t.Errorf("created %+v", upload)
	}
	path := "/v1/uploads/" + upload.ID
	part := func(content string) string {
		t.Helper()
		form, contentType := form([3]string{"data", "blob", content})
		status, body := r.do(t, "POST", path+"/parts", form, "Content-Type", contentType)
		part := decodeAs[wire.UploadPart](t, status, body)
		if part.Object != "upload.part" || part.UploadID != upload.ID || part.CreatedAt == 0 {
			t.Errorf("part %+v", part)
		}
		return part.ID
	}
	b, a := part("world"), part("hello")
	for _, test := range []struct {
		parts   [][3]string
		message string
	}{
		{[][3]string{{"file", "a", "x"}}, "no field named data"},
		{[][3]string{{"data", "a", ""}}, "empty"},
	} {
		form, contentType := form(test.parts...)
		status, body := r.do(t, "POST", path+"/parts", form, "Content-Type", contentType)
		wantError(t, test.message, status, body, 400, "data", "", test.message)
	}
	complete := func(ids []string, sum string) (int, string) {
		list, _ := json.Marshal(ids)
		return r.do(t, "POST", path+"/complete", fmt.Sprintf(`{"part_ids":%s,"md5":%q}`, list, sum), "Content-Type", "application/json")
	}
	sum := md5.Sum([]byte("helloworld"))
	digest := hex.EncodeToString(sum[:])
	status, body = complete(nil, digest)
	wantError(t, "no parts", status, body, 400, "part_ids", "", "required")
	status, body = complete([]string{a}, digest)
	wantError(t, "a part is missing", status, body, 400, "part_ids", "", "5 bytes together")
	status, body = complete([]string{a, "part_x"}, digest)
	wantError(t, "unknown part", status, body, 400, "part_ids[1]", "", "no part")
	status, body = complete([]string{b, a}, digest)
	wantError(t, "wrong order", status, body, 400, "md5", "", "order")
	status, body = complete([]string{a, b}, "abc")
	wantError(t, "no digest", status, body, 400, "md5", "", "32 hexadecimal digits")
	status, body = complete([]string{a, b}, digest)
	done := decodeAs[wire.Upload](t, status, body)
	if done.Status != "completed" || done.File == nil || done.File.Bytes != 10 || done.File.Filename != "a.jsonl" || done.File.ExpiresAt == nil {
		t.Fatalf("completed %+v", done)
	}
	if status, body := r.do(t, "GET", "/v1/files/"+done.File.ID+"/content", ""); status != 200 || body != "helloworld" {
		t.Errorf("content %d %s", status, body)
	}
	status, body = r.do(t, "POST", path+"/cancel", "")
	wantError(t, "cancel of a completed one", status, body, 400, "", "", "is completed")
	for _, action := range []string{"/parts", "/cancel"} {
		status, body = r.do(t, "POST", "/v1/uploads/upload_none"+action, "")
		wantError(t, action, status, body, 404, "id", "not_found", "does not exist")
	}
	status, body = create(`{` + good + `}`)
	path = "/v1/uploads/" + decodeAs[wire.Upload](t, status, body).ID
	status, body = r.do(t, "POST", path+"/cancel", "")
	if cancelled := decodeAs[wire.Upload](t, status, body); cancelled.Status != "cancelled" {
		t.Errorf("cancelled %+v", cancelled)
	}
	form, contentType := form([3]string{"data", "a", "x"})
	status, body = r.do(t, "POST", path+"/parts", form, "Content-Type", contentType)
	wantError(t, "part of a cancelled one", status, body, 400, "", "", "is cancelled")
}

// TestTooLargeAtOnce refuses files by what the request says of its length, before any of it is there.
func TestTooLargeAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	status, body := r.do(t, "POST", "/v1/uploads", `{"filename":"a","purpose":"batch","bytes":10,"mime_type":"text/plain"}`, "Content-Type", "application/json")
	upload := decodeAs[wire.Upload](t, status, body)
	for path, length := range map[string]int{"/v1/files": maxFileBytes + maxFormBytes + 1, "/v1/uploads/" + upload.ID + "/parts": maxPartBytes + maxFormBytes + 1} {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", r.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n--x\r\n", path, length)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("%s: %s", path, resp.Status)
		}
		resp.Body.Close()
		conn.Close()
	}
}

func TestFileRanges(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	form, contentType := form([3]string{"purpose", "", "user_data"}, [3]string{"file", "a.txt", "0123456789"})
	status, body := r.do(t, "POST", "/v1/files", form, "Content-Type", contentType)
	path := "/v1/files/" + decodeAs[wire.File](t, status, body).ID + "/content"
	get := func(headers ...string) (status int, header http.Header, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", r.URL+path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i+1 < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		resp, err := r.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b strings.Builder
		_, _ = bufio.NewReader(resp.Body).WriteTo(&b)
		return resp.StatusCode, resp.Header, b.String()
	}
	status, header, text := get()
	tag := header.Get("ETag")
	if status != 200 || text != "0123456789" || len(tag) != 66 || header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("whole: %d %q %q", status, text, tag)
	}
	if status, header, text := get("Range", "bytes=2-4"); status != 206 || text != "234" || header.Get("Content-Range") != "bytes 2-4/10" {
		t.Errorf("range: %d %q", status, text)
	}
	if status, _, text := get("Range", "bytes=-3", "If-Range", tag); status != 206 || text != "789" {
		t.Errorf("end: %d %q", status, text)
	}
	if status, _, text := get("Range", "bytes=-3", "If-Range", `"other"`); status != 200 || text != "0123456789" {
		t.Errorf("range of another content: %d %q", status, text)
	}
	if status, _, _ := get("Range", "bytes=10-"); status != 416 {
		t.Errorf("beyond the end: %d", status)
	}
	if status, _, _ := get("If-None-Match", tag); status != 304 {
		t.Errorf("known: %d", status)
	}
}
