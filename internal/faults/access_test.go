//go:build faults

package faults

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestForeignPages sends what browsers send for pages of other sites to every route.
func TestForeignPages(t *testing.T) {
	p := prove(t, "S14", "20 combinations of Host, Origin and Sec-Fetch-Site, as browsers send them for foreign pages, for every route", "403 for every rebound name and every write of another origin; nothing lets pages read answers; what a local client sends passes")
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	address := strings.TrimPrefix(s.url, "http://")
	combinations := []struct {
		headers       []string
		reads, writes bool // whether they are refused
	}{
		{nil, false, false},
		{[]string{"Host", "localhost:8080"}, false, false},
		{[]string{"Host", "LOCALHOST."}, false, false},
		{[]string{"Host", "[::1]"}, false, false},
		{[]string{"Host", address, "Origin", "http://" + address}, false, false},
		{[]string{"Sec-Fetch-Site", "same-origin"}, false, false},
		{[]string{"Sec-Fetch-Site", "none"}, false, false},
		{[]string{"X-Forwarded-Host", "evil.example"}, false, false},
		{[]string{"Host", "evil.example"}, true, true},
		{[]string{"Host", "evil.example:8080", "Origin", "http://evil.example:8080", "Sec-Fetch-Site", "same-origin"}, true, true},
		{[]string{"Host", "localhost.evil.example"}, true, true},
		{[]string{"Host", "127.0.0.1.evil.example"}, true, true},
		{[]string{"Host", "2130706433"}, true, true},
		{[]string{"Host", "0x7f.1"}, true, true},
		{[]string{"Host", "evil.example", "X-Forwarded-Host", "localhost"}, true, true},
		{[]string{"Origin", "http://evil.example"}, false, true},
		{[]string{"Origin", "null"}, false, true},
		{[]string{"Sec-Fetch-Site", "cross-site"}, false, true},
		{[]string{"Sec-Fetch-Site", "same-site"}, false, true},
		{[]string{"Origin", "http://localhost.evil.example", "Sec-Fetch-Site", "cross-site", "Content-Type", "text/plain"}, false, true},
	}
	refused := 0
	for _, r := range s.routes(t) {
		admin := strings.HasPrefix(r.path, "/metrics") || strings.HasPrefix(r.path, "/debug")
		for _, c := range combinations {
			status, text := s.raw(t, r.method, r.at("none"), "{}", c.headers...)
			want := c.reads
			if r.method != http.MethodGet {
				want = c.writes
			}
			if admin && slices.Contains(c.headers, "Sec-Fetch-Site") { // these cost something: a page may not even make a browser ask
				want = c.writes
			}
			if got := status == http.StatusForbidden; got != want || status == 0 {
				t.Errorf("%s %s with %q: %d %.200s", r.method, r.path, c.headers, status, text)
			} else if got {
				refused++
			}
			p.inject(1)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, s.url+r.at("none"), http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Origin", "http://evil.example")
		req.Header.Set("Access-Control-Request-Method", r.method)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode < 300 || resp.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("preflight of %s: %s %v", r.path, resp.Status, resp.Header)
		}
		p.inject(1)
	}
	p.found("%d refused, the others pass; no route has CORS", refused)
}

// TestBinds starts servers on addresses of all kinds, with and without a key.
func TestBinds(t *testing.T) {
	p := prove(t, "S15", "addresses that other machines reach, with and without a key", "without a key only loopback addresses are listened on, else the start is refused with the ways out; with a key every request needs it")
	home := newHome(t)
	hosts := map[string]bool{"127.0.0.1": true, "127.0.0.2": true, "localhost": true, "0.0.0.0": false, "": false, "::": false, "[::]": false, "::ffff:0.0.0.0": false, "0": false}
	if l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "[::1]:0"); err == nil {
		l.Close()
		hosts["::1"] = true
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLoopback() && ip.IP.To4() != nil {
			hosts[ip.IP.String()] = false
		}
	}
	listened, refused := 0, 0
	for host, loopback := range hosts {
		for _, key := range []string{"", "sk-of-sixteen-and-more", "short"} {
			var out bytes.Buffer
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			cmd := command(t, home, "serve", "--host", host, "--port", "0")
			cmd.Env = append(cmd.Env, "HONE_DEFAULT_MODEL=", "HONE_API_KEY="+key)
			cmd.Stderr = &out
			pipe, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
			var line []byte
			for b := make([]byte, 1); ; {
				n, err := pipe.Read(b)
				if line = append(line, b[:n]...); err != nil || bytes.Contains(line, []byte("listening")) && bytes.HasSuffix(line, []byte("\n")) {
					break
				}
			}
			listens := bytes.Contains(line, []byte("listening"))
			if listens && key != "" {
				url := string(bytes.TrimSpace(line[bytes.LastIndexByte(line, ' ')+1:]))
				port := url[strings.LastIndexByte(url, ':')+1:]
				target := url + "/v1/models"
				if ip := net.ParseIP(strings.Trim(host, "[]")); ip != nil && ip.IsUnspecified() || host == "0" {
					target = "http://127.0.0.1:" + port + "/v1/models"
				}
				if resp, err := get(t.Context(), target); err != nil {
					t.Errorf("%q: %v", host, err)
				} else if resp.Body.Close(); resp.StatusCode != http.StatusUnauthorized {
					t.Errorf("%q with a key answers %s to a request without one", host, resp.Status)
				}
			}
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			stop()
			cancel()
			open := !loopback && key != "sk-of-sixteen-and-more"
			switch {
			case listens && open:
				t.Errorf("%q with the key %q listens", host, key)
			case listens:
				listened++
			case open && key == "" && host != "0" && host != "" && !(strings.Contains(out.String(), "ssh -L") && strings.Contains(out.String(), "hone key new") && strings.Contains(out.String(), "HONE_API_KEY")):
				t.Errorf("%q is refused without the ways out: %s", host, out.String())
			case !open && !strings.HasPrefix(host, "[") && host != "0" && !strings.Contains(host, ":") && host != "":
				t.Errorf("%q with the key %q does not listen: %s", host, key, out.String())
			default:
				refused++
			}
			p.inject(1)
		}
	}
	p.found("%d starts listen, %d are refused; none that others reach listens without a key", listened, refused)
}

// TestKeys sends keys of all scopes in all forms to every route.
func TestKeys(t *testing.T) {
	p := prove(t, "S16", "keys of every scope and none, in every form of header, for every route", "401 without a right key, 403 for a scope that it lacks, by the document's table; other headers and the query let nobody in")
	home := newHome(t)
	keys := map[string]string{"infer": "sk-hone-infer-0123456789", "train": "sk-hone-train-0123456789", "admin": "sk-hone-admin-0123456789"}
	var yaml strings.Builder
	yaml.WriteString("keys:\n")
	for scope, key := range keys {
		fmt.Fprintf(&yaml, "  - {name: %s, sha256: %q, scopes: [%s]}\n", scope, fmt.Sprintf("%x", sha256.Sum256([]byte(key))), scope)
	}
	if err := os.WriteFile(filepath.Join(home, "hone.yaml"), []byte(yaml.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	s := start(t, home, "HONE_LOG_LEVEL=error")
	// Who may, by the rules of docs/security.md rather than by the table of the server.
	allowed := func(r route, scope string) bool {
		switch {
		case strings.HasPrefix(r.path, "/metrics") || strings.HasPrefix(r.path, "/debug"):
			return scope == "admin"
		case r == route{http.MethodPost, "/v1/batches"}:
			return false // needs two scopes, and these keys have one each
		case r.method == http.MethodDelete || strings.Contains(r.path, "/files") || strings.Contains(r.path, "/uploads") || strings.Contains(r.path, "/batches") || strings.Contains(r.path, "/fine_tuning"):
			return scope == "train"
		}
		return scope == "infer"
	}
	routes := []route{}
	// The document itself needs no key.
	for _, r := range s.routes(t) {
		if r.path != "/health" && r.path != "/ready" && r.path != "/openapi.json" {
			routes = append(routes, r)
		}
	}
	good := keys["infer"]
	for _, r := range routes {
		for _, headers := range [][]string{
			nil, {"Authorization", "Bearer sk-hone-wrong-0123456789"}, {"Authorization", "Bearer "}, {"Authorization", good}, {"Authorization", "Basic " + good}, {"Authorization", "Token " + good},
			{"Authorization", "Bearer " + good[:20]}, {"Authorization", "Bearer " + good + "x"}, {"Authorization", "Bearer " + strings.ToUpper(good)}, {"Authorization", fmt.Sprintf("Bearer %x", sha256.Sum256([]byte(good)))},
			{"X-Api-Key", good}, {"Api-Key", good}, {"X-Auth-Token", good}, {"Cookie", "Authorization=Bearer " + good}, {"Proxy-Authorization", "Bearer " + good},
		} {
			if status, text := s.raw(t, r.method, r.at("none")+"?api_key="+good, "{}", headers...); status != http.StatusUnauthorized {
				t.Errorf("%s %s with %q: %d %.200s", r.method, r.path, headers, status, text)
			}
			p.inject(1)
		}
		for scope, key := range keys {
			for _, form := range []string{"Bearer " + key, "bearer " + key, "BEARER  " + key} {
				status, text := s.raw(t, r.method, r.at("none"), "{}", "Authorization", form)
				if status == 0 || status == http.StatusUnauthorized || (status == http.StatusForbidden) == allowed(r, scope) {
					t.Errorf("%s %s with a key for %s as %q: %d %.200s", r.method, r.path, scope, form[:8], status, text)
				}
				p.inject(1)
			}
		}
	}
	if log, _ := os.ReadFile(s.log); bytes.Contains(log, []byte("sk-hone-")) {
		t.Error("the log has a key")
	}
	p.found("%d routes by the table; no key in the log", len(routes))
}

// TestLimits goes to every limit of a request and one beyond, and uploads more than memory may grow by.
func TestLimits(t *testing.T) {
	p := prove(t, "S17", "bodies, headers, uploads and lists at their limits and one beyond; compressed bodies", "taken up to the limit, beyond it 4xx with a sentence; the server's memory grows by less than 64 MiB over uploads of 300 and 600 MB")
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
		t.Fatal(err)
	}
	message := `{"role":"user","content":""}`
	messages := func(n int) string {
		return `"messages":[` + strings.TrimSuffix(strings.Repeat(message+",", n), ",") + `]`
	}
	list := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `"s%d",`, i)
		}
		return "[" + strings.TrimSuffix(b.String(), ",") + "]"
	}
	tools := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `{"type":"function","function":{"name":"f%d"}},`, i)
		}
		return "[" + strings.TrimSuffix(b.String(), ",") + "]"
	}
	one := messages(1)
	for _, c := range []struct {
		what        string
		body        func(n int) string
		limit       int
		alsoRefused string // what the reply at the limit may say all the same: it is another limit
	}{
		{"messages", func(n int) string { return messages(n) }, 4096, "context"},
		{"stop", func(n int) string { return one + `,"stop":` + list(n) }, 4, ""},
		{"n", func(n int) string { return one + fmt.Sprintf(`,"n":%d`, n) }, 8, ""},
		{"top_logprobs", func(n int) string { return one + fmt.Sprintf(`,"logprobs":true,"top_logprobs":%d`, n) }, 20, ""},
		{"guided_choice", func(n int) string { return one + `,"guided_choice":` + list(n) }, 256, ""},
		{"tools", func(n int) string { return one + `,"tools":` + tools(n) + `,"tool_choice":"none"` }, 128, "context"},
	} {
		for n := c.limit - 1; n <= c.limit+1; n++ {
			status, text := s.raw(t, http.MethodPost, "/v1/chat/completions", `{"model":"tiny","max_tokens":1,`+c.body(n)+`}`)
			other := c.alsoRefused != "" && strings.Contains(text, c.alsoRefused)
			if n > c.limit {
				mustRefuse(t, fmt.Sprintf("%d %s", n, c.what), status, text)
			} else if status != http.StatusOK && (status != http.StatusBadRequest || !other) {
				t.Errorf("%d %s: %d %.300s", n, c.what, status, text)
			}
			if n > c.limit && other {
				t.Errorf("%d %s are refused for another reason: %.300s", n, c.what, text)
			}
			p.inject(1)
		}
	}
	var long struct {
		Usage struct {
			TotalTokens int `json:"total_tokens"`
		}
	}
	s.must(t, http.MethodPost, "/v1/chat/completions", map[string]any{"model": tiny, "max_tokens": 1000000, "messages": []any{map[string]any{"role": "user", "content": "a"}}}, &long)
	if long.Usage.TotalTokens > 512 { // the tiny model's context
		t.Errorf("max_tokens of a million gave %+v", long)
	}
	p.inject(1)
	const body = 32 << 20
	for _, n := range []int{body - 1, body, body + 1} {
		status, text := s.raw(t, http.MethodPost, "/v1/chat/completions", `{"x":"`+strings.Repeat("x", n-len(`{"x":""}`))+`"}`)
		if (status == http.StatusRequestEntityTooLarge) != (n > body) || status == 0 {
			t.Errorf("a body of %d bytes: %d %.200s", n, status, text)
		}
		p.inject(1)
	}
	for _, n := range []int{60 << 10, 128 << 10, 8 << 20} {
		if status, text := s.raw(t, http.MethodGet, "/v1/models", "", "X-Long", strings.Repeat("x", n)); (status == http.StatusOK) != (n < 64<<10) || status != 0 && status != 200 && status != 431 {
			t.Errorf("a header of %d bytes: %d %.200s", n, status, text)
		}
		p.inject(1)
	}
	for _, encoding := range []string{"gzip", "deflate", "br", "zstd", "x"} {
		status, text := s.raw(t, http.MethodPost, "/v1/chat/completions", "{}", "Content-Encoding", encoding)
		if status != http.StatusUnsupportedMediaType {
			t.Errorf("Content-Encoding %s: %d %s", encoding, status, text)
		}
		p.inject(1)
	}
	s = start(t, newHome(t), "HONE_LOG_LEVEL=error") // one that has not grown by long bodies
	pid := s.cmd.Process.Pid
	before, most := resident(t, pid, "VmRSS"), 0
	ended := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-ended:
				return
			case <-time.After(20 * time.Millisecond):
				most = max(most, resident(t, pid, "VmRSS"))
			}
		}
	}()
	id, err := s.tryUpload(t.Context(), "large.jsonl", io.LimitReader(letters{}, 300<<20))
	if err != nil {
		t.Errorf("an upload of 300 MiB: %v", err)
	} else {
		s.must(t, http.MethodDelete, "/v1/files/"+id, nil, nil)
	}
	if _, err := s.tryUpload(t.Context(), "large.jsonl", io.LimitReader(letters{}, 600<<20)); err == nil {
		t.Error("an upload of 600 MiB was taken")
	}
	close(ended)
	<-watched
	p.inject(2)
	if most-before >= 64 {
		t.Errorf("the server grew from %d to %d MiB", before, most)
	}
	left, err := filepath.Glob(filepath.Join(s.home, "blobs", "tmp", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left of the refused upload: %v %v", left, err)
	}
	p.found("every limit holds to the one; over 900 MiB of uploads the server grew by %d MiB, and nothing is left of the refused one", most-before)
}

// letters is text without end.
type letters struct{}

func (letters) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = "abcdefghijklmno\n"[i%16]
	}
	return len(b), nil
}
