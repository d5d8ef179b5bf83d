//go:build faults

package faults

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	endian "encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hone-llm/hone/internal/gguf"
)

// A route is an operation of /openapi.json, such as GET /v1/files/{id}.
type route struct{ method, path string }

// routes are all operations that the server says it has.
func (s *server) routes(t *testing.T) (all []route) {
	t.Helper()
	var document struct {
		Paths map[string]map[string]json.RawMessage
	}
	s.must(t, http.MethodGet, "/openapi.json", nil, &document)
	for _, path := range slices.Sorted(maps.Keys(document.Paths)) {
		for _, method := range slices.Sorted(maps.Keys(document.Paths[path])) {
			switch method = strings.ToUpper(method); method {
			case http.MethodGet, http.MethodPost, http.MethodDelete:
				all = append(all, route{method, path})
			}
		}
	}
	if len(all) < 30 {
		t.Fatalf("/openapi.json has %d operations: %v", len(all), all)
	}
	return all
}

// at is the route's path with id for each of its parameters.
func (r route) at(id string) string {
	parts := strings.Split(r.path, "/")
	for i, part := range parts {
		if strings.HasPrefix(part, "{") {
			parts[i] = id
		}
	}
	return strings.Join(parts, "/")
}

// raw sends a request as it stands: no client cleans its target or its headers. The status is 0 if the connection was closed.
func (s *server) raw(t *testing.T, method, target, body string, headers ...string) (status int, text string) {
	t.Helper()
	address := strings.TrimPrefix(s.url, "http://")
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatalf("the server is gone: %v", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", method, target)
	host := false
	for i := 0; i+1 < len(headers); i += 2 {
		host = host || headers[i] == "Host"
		fmt.Fprintf(&b, "%s: %s\r\n", headers[i], headers[i+1])
	}
	if !host {
		fmt.Fprintf(&b, "Host: %s\r\n", address)
	}
	if method == http.MethodPost && !slices.Contains(headers, "Content-Type") {
		b.WriteString("Content-Type: application/json\r\n")
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	_, _ = io.WriteString(conn, b.String()) // the server may have answered before the end
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data)
}

// mustRefuse checks that a reply refuses a request, with a sentence in an envelope, and blames the request.
func mustRefuse(t *testing.T, what string, status int, text string) {
	t.Helper()
	var reply struct{ Error struct{ Message string } }
	if err := json.Unmarshal([]byte(text), &reply); status < 400 || status >= 500 || err != nil || len(reply.Error.Message) < 10 {
		t.Errorf("%.200s: %d %.300s", what, status, text)
	}
}

// A vault is a directory with a data directory and, beside it, files that no request may read, change or add to.
type vault struct{ dir, home, before string }

const secret = "the-secret-of-the-neighbour"

func newVault(t *testing.T) vault {
	t.Helper()
	v := vault{dir: t.TempDir()}
	v.home = filepath.Join(v.dir, "data")
	outside := filepath.Join(v.dir, "outside")
	if err := os.MkdirAll(outside, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{filepath.Join(outside, "secret"), filepath.Join(v.dir, "secret")} {
		if err := os.WriteFile(name, []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	addModel(t, v.home, "../train/testdata/tiny-llama-q4_1.gguf", tiny)
	v.before = v.outside(t)
	return v
}

// environment has the server keep what is not in its data directory in the vault as well.
func (v vault) environment() []string {
	return []string{"HOME=" + filepath.Join(v.dir, "outside"), "XDG_CACHE_HOME=", "XDG_DATA_HOME=", "HONE_DEFAULT_MODEL="}
}

// watch tells whether a secret of the vault has been opened since the last call.
func (v vault) watch(t *testing.T) (opened func() bool) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, name := range []string{filepath.Join(v.dir, "outside", "secret"), filepath.Join(v.dir, "secret")} {
		if _, err := unix.InotifyAddWatch(fd, name, unix.IN_OPEN); err != nil {
			t.Fatal(err)
		}
	}
	return func() bool {
		n, err := unix.Read(fd, make([]byte, 4096))
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Error(err)
		}
		return n > 0
	}
}

// outside is a hash of names, modes and content of everything in the vault but the data directory.
func (v vault) outside(t *testing.T) string {
	t.Helper()
	hash := sha256.New()
	err := filepath.WalkDir(v.dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == v.home:
			return filepath.SkipDir
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(hash, "%s %v\n", path, info.Mode())
		if d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(path)
		hash.Write(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", hash.Sum(nil))
}

// TestNames asks every route that takes an id or a name for hostile ones.
func TestNames(t *testing.T) {
	p := prove(t, "S1", "ids and names that lead out of the data directory, in every route and field that takes one", "each is refused with 4xx and a sentence; nothing outside the data directory is read or changed")
	v := newVault(t)
	s := start(t, v.home, v.environment()...)
	names := []string{
		"..", ".", "../secret", "../../secret", "../outside/secret", "..%2fsecret", "%2e%2e%2fsecret", "%2e%2e/secret", "..%5csecret", "%252e%252e%252fsecret",
		"%00", "tiny%00.gguf", "C:%5Csecret", "C:secret", "CON", "NUL", "aux.txt", "%2f%2fetc%2fpasswd", "/etc/passwd", "~/secret", "file:%2f%2f%2fetc%2fpasswd",
		"sha256:" + strings.Repeat("a", 63), "sha256-" + strings.Repeat("A", 64), "sha256:..%2f..%2fsecret", strings.Repeat("a", 4096), strings.Repeat("..%2f", 800) + "secret",
		"t%D1%96ny", "tiny%E2%80%8B", "%EF%BC%8E%EF%BC%8E%EF%BC%8Fsecret", "%E2%80%A5%2fsecret", "%C0%AE%C0%AE%C0%AFsecret", "%ff%fe", "tiny%20", "tiny.", "TINY", "-rf", "--help",
		"%0d%0aX-Injected:%201", "file-..%2f..%2fsecret", "ftjob-..%2fsecret", "ft:tiny:local:..%2f..%2fsecret:x", "ft:tiny:local:x:..%2f..%2fsecret", ".tmp-1", ".import-1", "%24(id)", "%60id%60",
	}
	n := 0
	for _, r := range s.routes(t) {
		if !strings.Contains(r.path, "{") {
			continue
		}
		for _, name := range names {
			status, text := s.raw(t, r.method, r.at(name), "{}")
			// GET /debug/pprof/ of the name . or of an empty one is the list of profiles, and a list of nothing names nothing.
			if status == http.StatusOK && strings.Contains(r.path, "pprof") && !strings.Contains(text, secret) {
				continue
			}
			if strings.HasSuffix(r.path, "/models/{id}") && (name == "." || name == "..") && status == http.StatusOK {
				continue
			}
			mustRefuse(t, r.method+" "+r.at(name), status, text)
			n++
		}
	}
	plain := []string{"../secret", "../../outside/secret", `..\secret`, "/etc/passwd", "a\x00b", "CON", "file:///etc/passwd", strings.Repeat("a", 4096), "tiny\u200b", "tіny", "．．／secret", "tiny/../tiny", "./tiny", "tiny/", v.dir + "/secret"}
	for _, name := range plain {
		for path, body := range map[string]any{
			"/v1/chat/completions":        map[string]any{"model": name, "messages": []any{map[string]any{"role": "user", "content": "a"}}},
			"/v1/completions":             map[string]any{"model": name, "prompt": "a"},
			"/v1/embeddings":              map[string]any{"model": name, "input": "a"},
			"/v1/decisions":               map[string]any{"model": name, "prompt": "a", "choices": []string{"A", "B"}},
			"/v1/tokenize":                map[string]any{"model": name, "prompt": "a"},
			"/v1/detokenize":              map[string]any{"model": name, "tokens": []int{1}},
			"/v1/fine_tuning/jobs":        map[string]any{"model": tiny, "training_file": name},
			"/v1/batches":                 map[string]any{"input_file_id": name, "endpoint": "/v1/chat/completions", "completion_window": "24h"},
			"/v1/fine_tuning/jobs?model":  map[string]any{"model": name, "training_file": "file-a"},
			"/v1/uploads/x/complete?part": map[string]any{"part_ids": []string{name}},
		} {
			status, text, err := s.do(t.Context(), http.MethodPost, path, body, nil)
			if err != nil {
				t.Fatal(err)
			}
			mustRefuse(t, path+" with "+name, status, text)
			n++
		}
	}
	// A file may be called anything: its name is no path.
	for _, name := range []string{"../../secret", "..", "/etc/passwd", `..\..\secret`, "CON", "a\x00b.jsonl", "$(touch " + v.dir + "/outside/pwned)"} {
		if id, err := s.tryUpload(t.Context(), name, strings.NewReader(rows(1))); err == nil {
			var file struct{ Filename string }
			s.must(t, http.MethodGet, "/v1/files/"+id, nil, &file)
			s.must(t, http.MethodGet, "/v1/files/"+id+"/content", nil, nil)
		}
		n++
	}
	p.inject(n)
	if v.outside(t) != v.before {
		t.Error("something changed outside the data directory")
	}
	log, _ := os.ReadFile(s.log)
	if bytes.Contains(log, []byte(secret)) || bytes.Contains(log, []byte("panic")) {
		t.Errorf("the log has a secret or a panic:\n%s", s.tail())
	}
	p.found("%d requests refused or their name kept as a text only; the tree beside the data directory has the same hash", n)
}

// TestArchives uploads archives, which hone unpacks none of.
func TestArchives(t *testing.T) {
	p := prove(t, "S3", "archives with absolute, climbing and linking members, as uploads, models and training files", "hone has no code that unpacks: they stay bytes under a digest, and a job on one fails with a sentence")
	v := newVault(t)
	s := start(t, v.home, v.environment()...)
	member := func(name string, kind byte, link string) []byte { // a tar of one member
		header := make([]byte, 1024)
		copy(header, name)
		copy(header[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00")
		header[156] = kind
		copy(header[157:], link)
		copy(header[257:], "ustar\x0000")
		sum := 0
		copy(header[148:], "        ")
		for _, b := range header[:512] {
			sum += int(b)
		}
		copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
		return header
	}
	out := v.dir + "/outside/member"
	for i, content := range [][]byte{
		member(out, '0', ""), member("../../outside/member", '0', ""), member("a", '2', v.dir+"/secret"), member("a", '1', "../../secret"), member("a", '3', ""), member("..", '5', ""),
		append(member("a", '2', v.dir+"/outside"), member("a/member", '0', "")...), append(member("a", '0', ""), member("a", '0', "")...),
		[]byte("PK\x03\x04" + strings.Repeat("\x00", 22) + "\x0c\x00\x00\x00../../member"), []byte("PK\x05\x06" + strings.Repeat("\xff", 18)),
		[]byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + strings.Repeat("\xff", 64)), []byte("BZh91AY&SY" + strings.Repeat("\x00", 64)),
	} {
		name := []string{"a.tar", "a.zip", "a.jsonl", "a.gguf"}[i%4]
		j := s.train(t, s.upload(t, name, string(content)), nil)
		if j = s.await(t, j.ID, time.Minute); j.Status != "failed" || len(j.Error.Message) < 10 {
			t.Errorf("archive %d: %+v", i, j)
		}
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if text, err := command(t, v.home, "models", "add", path, "--name", "archive").CombinedOutput(); err == nil || bytes.Contains(text, []byte("panic")) {
			t.Errorf("archive %d was added: %s", i, text)
		}
		p.inject(2)
	}
	if v.outside(t) != v.before {
		t.Error("something changed outside the data directory")
	}
	p.found("12 archives: every job failed with a sentence, no model was added, nothing was written beside the data directory")
}

// A mutant is a changed file and what was changed.
type mutant struct {
	how  string
	data []byte
}

// opened is a GGUF file, open for the time of the test, and its bytes.
func opened(t *testing.T, path string) (*gguf.File, []byte) {
	t.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return f, data
}

// mutants are n ways to mutant a GGUF file's header: counts, versions, lengths, types and values of keys, dimensions, types and
// offsets of tensors, cuts, and then flipped bits.
func mutants(t *testing.T, path string, n int, random *rand.Rand) (all []mutant) {
	t.Helper()
	f, file := opened(t, path)
	header := f.Size
	for _, tensor := range f.Tensors {
		header = min(header, tensor.Offset)
	}
	put := func(how string, at int, value []byte) {
		changed := slices.Clone(file)
		copy(changed[at:], value)
		if !bytes.Equal(changed, file) {
			all = append(all, mutant{how, changed})
		}
	}
	u32 := func(v uint32) []byte { return endian.LittleEndian.AppendUint32(nil, v) }
	u64 := func(v uint64) []byte { return endian.LittleEndian.AppendUint64(nil, v) }
	put("the magic", 0, []byte("GGML"))
	for _, v := range []uint32{0, 1, 4, 0x03000000, math.MaxUint32} {
		put(fmt.Sprintf("version %d", v), 4, u32(v))
	}
	for _, v := range []uint64{0, 1, 1 << 31, 1 << 62, math.MaxUint64, math.MaxUint64/368 + 1} { // the last overflows mem_size of ggml
		put(fmt.Sprintf("%d tensors", v), 8, u64(v))
		put(fmt.Sprintf("%d keys", v), 16, u64(v))
	}
	for _, key := range slices.Sorted(maps.Keys(map[string]gguf.Value(f.Metadata))) {
		at := bytes.Index(file, append(u64(uint64(len(key))), key...))
		if at < 0 {
			continue
		}
		kind := at + 8 + len(key)
		put(key+": length", at, u64(math.MaxUint64))
		put(key+": type", kind, u32([]uint32{13, 9, 8, 4, 12}[random.IntN(5)]))
		put(key+": value", kind+4, u64([]uint64{math.MaxUint64, 1 << 31, 1 << 62}[random.IntN(3)]))
	}
	for range 30 {
		tensor := f.Tensors[random.IntN(len(f.Tensors))]
		at := bytes.Index(file, append(u64(uint64(len(tensor.Name))), tensor.Name...)) + 8 + len(tensor.Name)
		dims := 8 * len(tensor.Shape)
		switch random.IntN(4) {
		case 0:
			put(tensor.Name+": dimensions", at, u32([]uint32{0, 5, 1 << 31, math.MaxUint32}[random.IntN(4)]))
		case 1:
			put(tensor.Name+": size", at+4, u64([]uint64{0, 1 << 31, 1 << 63, math.MaxUint64}[random.IntN(4)]))
		case 2:
			put(tensor.Name+": type", at+4+dims, u32([]uint32{4, 5, 31, 99, math.MaxUint32}[random.IntN(5)]))
		case 3:
			put(tensor.Name+": offset", at+8+dims, u64([]uint64{1, uint64(len(file)), 1 << 63, math.MaxUint64 - 31}[random.IntN(4)]))
		}
	}
	for cut := 0; cut < len(file); cut += 4096 {
		all = append(all, mutant{fmt.Sprintf("cut at %d", cut), file[:cut]})
	}
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for len(all) < n {
		changed, at := slices.Clone(file), random.IntN(int(header))
		changed[at] ^= 1 << random.IntN(8)
		all = append(all, mutant{fmt.Sprintf("a bit of byte %d", at), changed})
	}
	return all[:n]
}

// place puts a model straight into the models directory, as whoever can write there could.
func place(t *testing.T, home, name string, weights []byte) {
	t.Helper()
	dir := filepath.Join(home, "models", name)
	manifest, err := json.Marshal(map[string]any{"name": name, "digest": fmt.Sprintf("%x", sha256.Sum256(weights)), "bytes": len(weights), "source": "placed",
		"architecture": "llama", "parameters": 1, "context_tokens": 512, "quantisation": "Q4_1", "created_at": 1})
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "base.gguf"), weights, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "manifest.json"), manifest, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// crashed says whether the reply is that of a runner that ended, rather than refused.
func crashed(text string) bool { return strings.Contains(text, "runner_ended") }

// sound checks that the base model says what it said.
func (s *server) sound(t *testing.T, want, after string) {
	t.Helper()
	if got, _, err := s.chat(t.Context(), tiny, "Which one?", 16); err != nil || got != want {
		t.Fatalf("after %s the base model says %q, %v; before it said %q", after, got, err, want)
	}
}

// TestMutatedModels adds damaged models, and puts them where the runner reads them.
func TestMutatedModels(t *testing.T) {
	p := prove(t, "S7", "200 mutated model files: `hone models add`, and put straight into the models directory", "refused with a sentence before C reads them, or harmless; no runner dies of one, the base model's greedy answer stays")
	random := random(t)
	home := newHome(t)
	s := start(t, home, "HONE_RUNNER_IDLE_TIMEOUT=2s", "HONE_LOG_LEVEL=error")
	want, _, err := s.chat(t.Context(), tiny, "Which one?", 16)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile("../train/testdata/tiny-llama-q4_1.gguf")
	if err != nil {
		t.Fatal(err)
	}
	place(t, home, "whole", whole)
	if text, _, err := s.chat(t.Context(), "whole", "Which one?", 16); err != nil || text != want {
		t.Fatalf("a placed model that is not damaged: %q, %v", text, err)
	}
	refusedAdd, refusedRun := 0, 0
	for i, d := range mutants(t, "../train/testdata/tiny-llama-q4_1.gguf", 200, random) {
		name := fmt.Sprintf("m%d", i)
		path := filepath.Join(t.TempDir(), name+".gguf")
		if err := os.WriteFile(path, d.data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := command(t, home, "models", "add", path, "--name", name).CombinedOutput()
		if bytes.Contains(out, []byte("panic")) || err != nil && len(out) < 20 {
			t.Errorf("%s: %v %s", d.how, err, out)
		}
		if err != nil {
			refusedAdd++
			place(t, home, name, d.data)
		}
		_, status, err := s.chat(t.Context(), name, "Which one?", 4)
		switch {
		case err == nil:
		case crashed(err.Error()) || status == 0 || status == http.StatusNotFound:
			t.Errorf("%s: %d, %v", d.how, status, err)
		case len(err.Error()) < 60:
			t.Errorf("%s: %v", d.how, err)
		default:
			refusedRun++
		}
		if err := os.RemoveAll(filepath.Join(home, "models", name)); err != nil {
			t.Fatal(err)
		}
		p.inject(1)
		if i%25 == 24 {
			s.sound(t, want, d.how)
		}
	}
	s.sound(t, want, "all")
	for deadline := time.Now().Add(30 * time.Second); len(s.children(t)) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("children are left: %v", s.children(t))
		}
	}
	p.found("%d refused by `hone models add`, %d by the runner, the others are harmless; no runner died, no child was left, the base model answers the same", refusedAdd, refusedRun)
}

// tuned trains an adapter of the tiny model and returns its name and directory.
func (s *server) tuned(t *testing.T) (name, dir string) {
	t.Helper()
	j := s.train(t, s.upload(t, "train.jsonl", rows(8)), map[string]any{"r": 4, "num_train_epochs": 1, "batch_size": 4})
	if j = s.await(t, j.ID, time.Minute); j.Status != "succeeded" {
		t.Fatalf("the job is %+v", j)
	}
	name = j.FineTunedModel
	return name, filepath.Join(s.home, "adapters", name[strings.LastIndexByte(name, ':')+1:])
}

// plant puts a copy of an adapter beside it, with change made to its manifest and with other weights unless they are nil.
func plant(t *testing.T, from, id string, weights []byte, change func(manifest map[string]any)) (name string) {
	t.Helper()
	to := filepath.Join(filepath.Dir(from), id)
	temp := filepath.Join(filepath.Dir(from), ".plant")
	err := os.CopyFS(temp, os.DirFS(from))
	var data []byte
	if err == nil {
		data, err = os.ReadFile(filepath.Join(temp, "manifest.json"))
	}
	var manifest map[string]any
	if err == nil {
		err = json.Unmarshal(data, &manifest)
	}
	if err != nil {
		t.Fatal(err)
	}
	name = "ft:" + tiny + ":local::" + id
	manifest["id"], manifest["name"] = id, name
	if weights != nil {
		manifest["files"].(map[string]any)["adapter.gguf"] = fmt.Sprintf("%x", sha256.Sum256(weights))
		_ = os.Remove(filepath.Join(temp, "adapter.gguf"))
		err = os.WriteFile(filepath.Join(temp, "adapter.gguf"), weights, 0o600)
	}
	if change != nil {
		change(manifest)
	}
	if err == nil {
		data, err = json.Marshal(manifest)
	}
	if err == nil {
		_ = os.Remove(filepath.Join(temp, "manifest.json"))
		err = os.WriteFile(filepath.Join(temp, "manifest.json"), data, 0o600)
	}
	if err == nil {
		err = os.Rename(temp, to)
	}
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestMutatedAdapters puts damaged adapters into the registry's directory, with manifests that fit them.
func TestMutatedAdapters(t *testing.T) {
	p := prove(t, "S7", "60 mutated adapters in the registry: bad magic, another rank, shape or base, NaN and infinite weights, cut off", "refused with a sentence before C reads them, or harmless; the runner lives on, the base model's greedy answer stays")
	random := random(t)
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	_, dir := s.tuned(t)
	want, _, err := s.chat(t.Context(), tiny, "Which one?", 16)
	if err != nil {
		t.Fatal(err)
	}
	runner := s.children(t)
	path := filepath.Join(dir, "adapter.gguf")
	f, file := opened(t, path)
	var all []mutant
	rewrite := func(how string, key func(string, gguf.Value) any, tensor func(*gguf.TensorData)) {
		var metadata []gguf.KeyValue
		for _, name := range slices.Sorted(maps.Keys(map[string]gguf.Value(f.Metadata))) {
			var value any = f.Metadata[name]
			if key != nil {
				value = key(name, f.Metadata[name])
			}
			if value != nil {
				metadata = append(metadata, gguf.KeyValue{Key: name, Value: value})
			}
		}
		var tensors []gguf.TensorData
		for _, from := range f.Tensors {
			to := gguf.TensorData{Name: from.Name, Shape: slices.Clone(from.Shape), Type: from.Type, Data: slices.Clone(f.Data(from))}
			if tensor != nil {
				tensor(&to)
			}
			if to.Name != "" {
				tensors = append(tensors, to)
			}
		}
		var b bytes.Buffer
		if err := gguf.Write(&b, metadata, tensors); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		all = append(all, mutant{how, b.Bytes()})
	}
	for _, bits := range []uint32{0x7fc00000, 0x7f800000, 0xff800000, 0x7f800001} {
		for _, half := range []string{".lora_a", ".lora_b"} {
			rewrite(fmt.Sprintf("%08x in %s", bits, half), nil, func(d *gguf.TensorData) {
				if strings.HasSuffix(d.Name, half) {
					endian.LittleEndian.PutUint32(d.Data[4*random.IntN(len(d.Data)/4):], bits)
				}
			})
		}
	}
	for _, arch := range []string{"qwen2", "", strings.Repeat("a", 5000)} {
		rewrite("base "+arch[:min(len(arch), 9)], func(name string, v gguf.Value) any {
			if name == "general.architecture" {
				return arch
			}
			return v
		}, nil)
	}
	for _, alpha := range []any{float32(math.NaN()), float32(math.Inf(1)), "8", nil} {
		rewrite(fmt.Sprintf("alpha %v", alpha), func(name string, v gguf.Value) any {
			if name == "adapter.lora.alpha" {
				return alpha
			}
			return v
		}, nil)
	}
	for _, half := range []string{".lora_a", ".lora_b"} {
		rewrite("the rank of "+half, nil, func(d *gguf.TensorData) {
			if strings.HasSuffix(d.Name, half) { // one rank less: A is [in, r], B is [r, out]
				i := map[string]int{".lora_a": 1, ".lora_b": 0}[half]
				d.Data = d.Data[:int64(len(d.Data))/d.Shape[i]*(d.Shape[i]-1)]
				d.Shape[i]--
			}
		})
		rewrite("the shape of "+half, nil, func(d *gguf.TensorData) {
			if strings.HasSuffix(d.Name, half) {
				slices.Reverse(d.Shape)
			}
		})
		rewrite("without "+half, nil, func(d *gguf.TensorData) {
			if strings.HasSuffix(d.Name, half) {
				d.Name = ""
			}
		})
	}
	rewrite("names of another model", nil, func(d *gguf.TensorData) { d.Name = strings.Replace(d.Name, "blk.0", "blk.77", 1) })
	all = append(all, mutant{"another magic", append([]byte("GGML"), file[4:]...)}, mutant{"empty", []byte{}}, mutant{"text", []byte("hello")})
	for cut := 4096; cut < len(file) && len(all) < 40; cut += 4096 {
		all = append(all, mutant{fmt.Sprintf("cut at %d", cut), file[:cut]})
	}
	structural := len(all)
	all = append(all, mutants(t, path, 60-structural, random)...)
	if _, _, err := s.chat(t.Context(), plant(t, dir, "whole", file, nil), "Which one?", 4); err != nil {
		t.Fatalf("an adapter that is not damaged: %v", err)
	}
	refused := 0
	for i, d := range all {
		name := plant(t, dir, fmt.Sprintf("mutant%d", i), d.data, nil)
		_, status, err := s.chat(t.Context(), name, "Which one?", 4)
		switch {
		case err == nil && i < structural:
			t.Errorf("an adapter with %s was served", d.how)
		case err == nil:
		case status == 0 || status == http.StatusNotFound || crashed(err.Error()) || len(err.Error()) < 60:
			t.Errorf("%s: %v", d.how, err)
		default:
			refused++
		}
		s.sound(t, want, d.how)
		p.inject(1)
	}
	// And with a manifest that lies: its base, and paths of its own.
	for i, change := range []func(map[string]any){
		func(m map[string]any) { m["base_digest"] = strings.Repeat("0", 64) },
		func(m map[string]any) { m["base_model"] = "../../" + tiny },
		func(m map[string]any) { m["files"] = map[string]any{"../../secret": strings.Repeat("0", 64)} },
		func(m map[string]any) { m["id"] = "../x" },
		func(m map[string]any) { m["name"] = "../x" },
		func(m map[string]any) { m["rank"] = -1 },
	} {
		name := plant(t, dir, fmt.Sprintf("liar%d", i), nil, change)
		if _, status, err := s.chat(t.Context(), name, "Which one?", 4); err == nil || status < 400 {
			t.Errorf("liar %d was served: %v", i, err)
		}
		p.inject(1)
	}
	if now := s.children(t); !slices.Equal(runner, now) {
		t.Errorf("the children are %v, they were %v", now, runner)
	}
	p.found("%d of 60 refused with a sentence, the others are harmless; 6 lying manifests are not served; the same runner answers the same after each", refused)
}

// TestHeaders gives hone the two headers that brought engines down.
func TestHeaders(t *testing.T) {
	f, file := opened(t, "../train/testdata/tiny-llama-q4_1.gguf")
	end := func(tensor gguf.Tensor) int { // of its dimensions
		name := append(endian.LittleEndian.AppendUint64(nil, uint64(len(tensor.Name))), tensor.Name...)
		return bytes.Index(file, name) + len(name) + 4 + 8*len(tensor.Shape)
	}
	try := func(p *proof, all []mutant, words string) {
		home := newHome(t)
		s := start(t, home, "HONE_LOG_LEVEL=error")
		for i, d := range all {
			name := fmt.Sprintf("h%d", i)
			bad := filepath.Join(t.TempDir(), "bad.gguf")
			if err := os.WriteFile(bad, d.data, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := command(t, home, "models", "add", bad, "--name", name).CombinedOutput()
			if err == nil || bytes.Contains(out, []byte("goroutine ")) || len(out) < 30 {
				t.Errorf("%s: %v %s", d.how, err, out)
			}
			place(t, home, name, d.data)
			if _, status, err := s.chat(t.Context(), name, "a", 2); err == nil || status == 0 || status == http.StatusNotFound || crashed(err.Error()) {
				t.Errorf("%s: %d, %v", d.how, status, err)
			}
			p.inject(2)
		}
		if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
			t.Error(err)
		}
		p.found(words, len(all))
	}
	change := func(how string, at int, values ...uint64) mutant {
		changed := slices.Clone(file)
		for i, v := range values {
			endian.LittleEndian.PutUint64(changed[at+8*i:], v)
		}
		return mutant{how, changed}
	}
	p := prove(t, "S4", "tensors whose offset or size leads beyond the file", "refused when added and by the runner, before C reads them")
	var beyond []mutant
	for _, tensor := range f.Tensors {
		if len(beyond) == 24 {
			break
		}
		at, n := end(tensor), len(tensor.Shape)
		beyond = append(beyond, change(tensor.Name+" offset", at+4, uint64(len(file))), change(tensor.Name+" offset overflows", at+4, 1<<64-32),
			change(tensor.Name+" size", at-8*n, 1<<40), change(tensor.Name+" size overflows", at-8, 1<<63))
	}
	try(p, beyond, "%d headers refused with a sentence, both ways; the base model answers")
	p = prove(t, "S5", "counts and sizes that overflow the engine's mem_size (CVE-2025-53630, CVE-2026-27940)", "refused when added and by the runner, before C reads them")
	counts := []mutant{change("sizes", end(f.Tensors[0])-8*len(f.Tensors[0].Shape), 1<<62)}
	for _, overhead := range []uint64{1, 16, 256, 320, 336, 352, 368, 384, 400} { // bytes of a ggml_tensor with its object, in some versions
		counts = append(counts, change(fmt.Sprintf("tensors x %d", overhead), 8, math.MaxUint64/overhead), change(fmt.Sprintf("tensors x %d + 1", overhead), 8, math.MaxUint64/overhead+1))
	}
	if n := len(f.Tensors[0].Shape); n == 2 { // their product is the length of the data again, modulo 2^64
		counts = append(counts, change("a product that wraps", end(f.Tensors[0])-16, 1<<63, 1<<63))
	}
	try(p, counts, "%d headers refused with a sentence, both ways; the base model answers")
}

// variant writes the tiny model with other metadata.
func variant(t *testing.T, change map[string]any) []byte {
	t.Helper()
	f, _ := opened(t, "../train/testdata/tiny-llama-q4_1.gguf")
	var metadata []gguf.KeyValue
	for _, name := range slices.Sorted(maps.Keys(map[string]gguf.Value(f.Metadata))) {
		if _, changed := change[name]; !changed {
			metadata = append(metadata, gguf.KeyValue{Key: name, Value: f.Metadata[name]})
		}
	}
	for name, value := range change {
		metadata = append(metadata, gguf.KeyValue{Key: name, Value: value})
	}
	var tensors []gguf.TensorData
	for _, from := range f.Tensors {
		tensors = append(tensors, gguf.TensorData{Name: from.Name, Shape: from.Shape, Type: from.Type, Data: f.Data(from)})
	}
	var b bytes.Buffer
	if err := gguf.Write(&b, metadata, tensors); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// resident is the memory of a process that is in RAM, in MiB: VmRSS, or with VmHWM the most it ever was.
func resident(t *testing.T, pid int, field string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			n, _ := strconv.Atoi(strings.Fields(value)[0])
			return n >> 10
		}
	}
	t.Fatalf("process %d has no %s", pid, field)
	return 0
}

// TestTemplates gives hone models whose chat templates are programs against it.
func TestTemplates(t *testing.T) {
	p := prove(t, "S9", "chat templates in model files that read files, run code, double a text 40 times, loop and recurse without end; chat_template in requests", "refused with a sentence within seconds, by steps, memory and output that are bounded; nothing is read; the runner lives")
	home := newHome(t)
	s := start(t, home, "HONE_LOG_LEVEL=error")
	hostname, err := os.ReadFile("/etc/hostname")
	if err != nil {
		hostname = []byte("no such file, no such text")
	}
	var slowest time.Duration
	most := 0
	for i, template := range []string{
		`{% include "/etc/hostname" %}`,
		`{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.popen('id').read() }}`,
		`{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}`,
		`{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}`,
		`{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('xxxxxxxx') }}`,
		`{{ ('x' * 1000000000000) | upper | list | length }}`,
	} {
		name := fmt.Sprintf("t%d", i)
		bad := filepath.Join(t.TempDir(), "bad.gguf")
		weights := variant(t, map[string]any{"tokenizer.chat_template": template})
		if err := os.WriteFile(bad, weights, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := command(t, home, "models", "add", bad, "--name", name).CombinedOutput(); err != nil {
			if bytes.Contains(out, hostname) || bytes.Contains(out, []byte("panic")) {
				t.Errorf("%s: %s", template, out)
			}
			place(t, home, name, weights)
		}
		began := time.Now()
		text, status, err := s.chat(t.Context(), name, "a", 2)
		took := time.Since(began)
		slowest = max(slowest, took)
		if err == nil || status == 0 || err != nil && (crashed(err.Error()) || strings.Contains(err.Error(), strings.TrimSpace(string(hostname)))) {
			t.Errorf("%s: %q %v", template, text, err)
		}
		if took > 20*time.Second {
			t.Errorf("%s took %v", template, took)
		}
		for _, pid := range s.children(t) {
			most = max(most, resident(t, pid, "VmHWM"))
		}
		p.inject(1)
	}
	if most > 1024 {
		t.Errorf("a runner took %d MiB", most)
	}
	message := []any{map[string]any{"role": "user", "content": "a"}}
	for _, extra := range []map[string]any{
		{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": map[string]any{"chat_template": "{{ 1 }}"}}, {"chat_template_kwargs": map[string]any{"messages": []any{}}},
		{"chat_template_kwargs": map[string]any{"tokenize": true}},
	} {
		body := map[string]any{"model": tiny, "messages": message, "max_tokens": 1}
		maps.Copy(body, extra)
		status, text, err := s.do(t.Context(), http.MethodPost, "/v1/chat/completions", body, nil)
		if err != nil {
			t.Fatal(err)
		}
		mustRefuse(t, fmt.Sprint(extra), status, text)
		p.inject(1)
	}
	if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
		t.Error(err)
	}
	p.found("6 templates and 4 requests refused; the slowest answer came after %v, and no runner took more than %d MiB", slowest.Round(time.Millisecond), most)
}

// TestNumbers puts extreme numbers into every field of every JSON body.
func TestNumbers(t *testing.T) {
	p := prove(t, "S6", "negative, huge, fractional and malformed numbers in every field of every JSON body", "400 or within the field's bounds; unknown fields reach no engine; the runner stays the same process")
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	file := s.upload(t, "train.jsonl", rows(2))
	var document struct {
		Paths map[string]map[string]struct {
			RequestBody struct {
				Content map[string]struct {
					Schema struct {
						Ref string `json:"$ref"`
					}
				}
			}
		}
		Components struct {
			Schemas map[string]struct {
				Properties map[string]json.RawMessage
			}
		}
	}
	s.must(t, http.MethodGet, "/openapi.json", nil, &document)
	if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
		t.Fatal(err)
	}
	runner := s.children(t)
	chat := `"messages":[{"role":"user","content":"a"}]`
	base := map[string]string{
		"/v1/chat/completions": `"model":"tiny","max_tokens":2,` + chat, "/v1/completions": `"model":"tiny","max_tokens":2,"prompt":"a"`, "/v1/embeddings": `"model":"tiny","input":"a"`,
		"/v1/decisions": `"model":"tiny","prompt":"a","choices":["A","B"]`, "/v1/tokenize": `"model":"tiny","prompt":"a"`, "/v1/detokenize": `"model":"tiny","tokens":[1]`,
		"/tokenize": `"model":"tiny","prompt":"a"`, "/detokenize": `"model":"tiny","tokens":[1]`,
		"/v1/fine_tuning/jobs/dry_run": `"model":"tiny","training_file":"` + file + `"`, "/v1/batches": `"endpoint":"/v1/chat/completions","completion_window":"24h","input_file_id":"none"`,
		"/v1/uploads": `"filename":"a","purpose":"batch","bytes":1,"mime_type":"text/plain"`,
	}
	refused := 0
	for path, fixed := range base {
		schema := strings.TrimPrefix(document.Paths[path]["post"].RequestBody.Content["application/json"].Schema.Ref, "#/components/schemas/")
		fields := slices.Sorted(maps.Keys(document.Components.Schemas[schema].Properties))
		if len(fields) < 2 {
			t.Fatalf("%s has the fields %v", path, fields)
		}
		fields = append(fields, "n_discard", "n_keep", "n_ctx", "id_slot", "n_indent", "n_probs", "cache_prompt", "slot_id") // an engine's
		numbers := []string{"-1", "-2147483649", "2147483648", "9223372036854775808", "1e308", "-1e999", "-0", "0.5", "NaN", `"NaN"`, `[-1]`, `{"a":-1}`}
		if strings.Contains(path, "dry_run") { // a good one starts a trainer
			numbers = []string{"-1", "1e308", "NaN"}
		}
		for _, field := range fields {
			for _, number := range numbers {
				status, text := s.raw(t, http.MethodPost, path, fmt.Sprintf(`{%s,%q:%s}`, fixed, field, number))
				if status != http.StatusOK {
					mustRefuse(t, path+" "+field+" "+number, status, text)
					refused++
				}
				p.inject(1)
			}
		}
	}
	if now := s.children(t); !slices.Equal(runner, now) {
		t.Errorf("the children are %v, they were %v", now, runner)
	}
	p.found("%d of %d refused with 4xx, the others were in bounds or ignored; the same runner", refused, p.injected.Load())
}

// TestSchemas goes to the limits of constraints and one beyond.
func TestSchemas(t *testing.T) {
	p := prove(t, "S8", "schemas, patterns and grammars at their limits and one beyond: depth 64, 256 KiB, cycles of $ref, 60,000 groups, costly keywords", "beyond it refused with 400; compiling takes at most 250 ms of the runner's time; the runner stays")
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
		t.Fatal(err)
	}
	runner := s.children(t)
	if len(runner) != 1 {
		t.Fatal(runner)
	}
	cpu := func() time.Duration {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", runner[0]))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		user, _ := strconv.Atoi(fields[11])
		system, _ := strconv.Atoi(fields[12])
		return time.Duration(user+system) * 10 * time.Millisecond
	}
	nested := func(depth int) string { // values of the schema are nested so deep: each items is one
		return strings.Repeat(`{"items":`, depth) + `{}` + strings.Repeat(`}`, depth)
	}
	long := func(bytes int) string {
		head, tail := `{"type":"object","description":"`, `"}`
		return head + strings.Repeat("a", bytes-len(head)-len(tail)) + tail
	}
	object := func(n int) string {
		var b strings.Builder
		b.WriteString(`{"type":"object","properties":{`)
		for i := range n {
			fmt.Fprintf(&b, `"p%d":{"type":"integer"},`, i)
		}
		return strings.TrimSuffix(b.String(), ",") + "}}"
	}
	type constraint struct {
		what, field, value string
		refused            bool
	}
	quote := func(s string) string { q, _ := json.Marshal(s); return string(q) }
	all := []constraint{
		{"depth 63", "guided_json", nested(63), false}, {"depth 64", "guided_json", nested(64), false}, {"depth 65", "guided_json", nested(65), true},
		{"256 KiB - 1", "guided_json", long(256<<10 - 1), false}, {"256 KiB", "guided_json", long(256 << 10), false}, {"256 KiB + 1", "guided_json", long(256<<10 + 1), true},
		{"300 properties", "guided_json", object(300), false}, {"600 properties, too many to go on with", "guided_json", object(600), true}, {"20,000 properties", "guided_json", object(20000), true},
		{"a cycle of $ref", "guided_json", `{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}`, true},
		{"a $ref to itself", "guided_json", `{"$ref":"#"}`, true}, {"a $ref elsewhere", "guided_json", `{"$ref":"http://127.0.0.1/a.json"}`, true}, {"a $ref to a file", "guided_json", `{"$ref":"file:///etc/passwd"}`, true},
		{"multipleOf", "guided_json", `{"type":"integer","multipleOf":1000003}`, true},
		{"16 KiB - 1 of pattern", "guided_regex", quote(strings.Repeat("a", 16<<10-1)), false}, {"16 KiB of pattern", "guided_regex", quote(strings.Repeat("a", 16<<10)), false}, {"16 KiB + 1 of pattern", "guided_regex", quote(strings.Repeat("a", 16<<10+1)), true},
		{"a look-behind", "guided_regex", quote(`(?<=a)b`), true}, {"a back reference", "guided_regex", quote(`(a)\1`), true},
		{"nested repetitions", "guided_regex", quote(`((((a{1,999}){1,999}){1,999}){1,999}){1,999}`), true}, {"(a+)+", "guided_regex", quote(`(a+)+$`), true},
		{"60,000 groups", "guided_regex", quote(strings.Repeat("(", 60000) + "a" + strings.Repeat(")", 60000)), true}, {"8,000 groups", "guided_regex", quote(strings.Repeat("(", 8000) + "a" + strings.Repeat(")", 8000)), true},
		{"60,000 groups of a grammar", "guided_grammar", quote("start: " + strings.Repeat("(", 60000) + `"a"` + strings.Repeat(")", 60000)), true},
		{"64 KiB of grammar", "guided_grammar", quote("start: \"" + strings.Repeat("a", 64<<10-9) + "\""), false},
		{"64 KiB + 1 of grammar", "guided_grammar", quote("start: \"" + strings.Repeat("a", 64<<10-9+1) + "\""), true},
		{"a grammar without end", "guided_grammar", quote("start: start"), true},
		{"a pattern of a tool", "tools", `[{"type":"function","function":{"name":"f","strict":true,"parameters":{"type":"object","properties":{"a":{"type":"string","pattern":` + quote(strings.Repeat("(", 60000)+strings.Repeat(")", 60000)) + `}}}}}],"tool_choice":"required"`, true},
		{"depth of a tool", "tools", `[{"type":"function","function":{"name":"f","parameters":` + nested(100000) + `}}],"tool_choice":"required"`, true},
	}
	linear := []string{"(a+)+", "nested repetitions"} // automata read these in one pass: they may be compiled
	var worst time.Duration
	dearest := ""
	ok, refused := 0, 0
	for _, c := range all {
		before := cpu()
		status, text := s.raw(t, http.MethodPost, "/v1/chat/completions", `{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":"a"}],"`+c.field+`":`+c.value+`}`)
		took := cpu() - before
		if took > worst {
			worst, dearest = took, c.what
		}
		switch {
		case status != http.StatusOK || c.refused && !slices.Contains(linear, c.what):
			if c.refused {
				mustRefuse(t, c.what, status, text)
				refused++
			} else {
				t.Errorf("%s: %d %.300s", c.what, status, text)
			}
		default:
			ok++
		}
		p.inject(1)
	}
	if now := s.children(t); !slices.Equal(runner, now) {
		t.Errorf("the children are %v, they were %v", now, runner)
	}
	if worst > 250*time.Millisecond {
		t.Errorf("%s took %v of the runner's time", dearest, worst)
	}
	p.found("%d compiled, %d refused; the dearest (%s) took %v of the runner's time; the same runner", ok, refused, dearest, worst)
}

// TestPickles uploads what other servers unpickle, and looks for code that could.
func TestPickles(t *testing.T) {
	p := prove(t, "S10", "pickled weights as uploads, models and adapters; code that unpickles", "nothing is unpickled: the sources have no such code, models are GGUF, an upload of a pickle is refused with 415")
	v := newVault(t)
	s := start(t, v.home, v.environment()...)
	pickle := "\x80\x04cposix\nsystem\n(S'touch " + v.dir + "/outside/pwned'\ntR."
	for _, ending := range []string{"bin", "pt", "pth", "pkl", "ckpt", "llamafile"} {
		path := filepath.Join(t.TempDir(), "a."+ending)
		if err := os.WriteFile(path, []byte(pickle), 0o700); err != nil {
			t.Fatal(err)
		}
		if out, err := command(t, v.home, "models", "add", path, "--name", "pickle").CombinedOutput(); err == nil {
			t.Errorf("%s was added: %s", path, out)
		}
		for name, content := range map[string]string{"a." + ending: "{}\n", "A." + strings.ToUpper(ending): pickle, ending + ".jsonl": pickle, "zip.jsonl": "PK\x03\x04 archive/data.pkl " + pickle} {
			if _, err := s.tryUpload(t.Context(), name, strings.NewReader(content)); err == nil || !strings.Contains(err.Error(), ": 415 ") || !strings.Contains(err.Error(), "is code") && !strings.Contains(err.Error(), "are code") {
				t.Errorf("%s: %v", name, err)
			}
		}
		status, text, err := s.do(t.Context(), http.MethodPost, "/v1/uploads", map[string]any{"filename": "a." + ending, "purpose": "fine-tune", "bytes": 1, "mime_type": "text/plain"}, nil)
		if err != nil || status != http.StatusUnsupportedMediaType {
			t.Errorf("an upload in parts of a.%s: %d %s, %v", ending, status, text, err)
		}
		p.inject(6)
	}
	var list struct{ Data []struct{ ID string } }
	if s.must(t, http.MethodGet, "/v1/files", nil, &list); len(list.Data) > 0 {
		t.Errorf("files %v are listed", list.Data)
	}
	if v.outside(t) != v.before {
		t.Error("something changed outside the data directory")
	}
	looked := 0
	err := sources(func(path string, data []byte) {
		looked++
		for _, word := range []string{"import " + "pickle", "torch" + ".load(", "weights_only" + "=False", "joblib" + ".load", "encoding/" + "gob\""} {
			if bytes.Contains(data, []byte(word)) {
				t.Errorf("%s has %s", path, word)
			}
		}
	})
	if err != nil || looked < 200 {
		t.Errorf("%d sources, %v", looked, err)
	}
	p.inject(looked)
	p.found("36 pickles refused with a sentence; none of %d source files unpickles", looked)
}

// sources reads the Go and Python files of the module.
func sources(read func(path string, data []byte)) error {
	return filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "build" || d.Name() == ".git" || d.Name() == "bin" || d.Name() == "lib") {
			return filepath.SkipDir
		}
		if ext := filepath.Ext(path); ext != ".go" && ext != ".py" {
			return nil
		}
		data, err := os.ReadFile(path)
		if err == nil {
			read(path, data)
		}
		return err
	})
}

// TestUpdates looks for code that would make hone replace itself.
func TestUpdates(t *testing.T) {
	p := prove(t, "S19", "an update that somebody else offers", "no such code: hone starts only itself, and writes no file of its own program")
	before, err := os.ReadFile(*binary)
	if err != nil {
		t.Fatal(err)
	}
	looked := 0
	err = sources(func(path string, data []byte) {
		if strings.HasSuffix(path, "_test.go") || filepath.Ext(path) != ".go" {
			return
		}
		looked++
		if bytes.Contains(data, []byte("self"+"update")) || bytes.Contains(data, []byte("go-"+"update")) || bytes.Contains(data, []byte("releases/"+"latest")) {
			t.Errorf("%s has code that updates", path)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, newHome(t))
	if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
		t.Fatal(err)
	}
	if code, _ := s.stop(t); code != 0 {
		t.Errorf("the server ended with %d", code)
	}
	if after, err := os.ReadFile(*binary); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the program has changed: %v", err)
	}
	p.inject(looked)
	p.found("none of %d source files fetches a program; the binary is the same after a run", looked)
}

// TestMarkup puts markup where a web page would show it.
func TestMarkup(t *testing.T) {
	p := prove(t, "S20", "markup in file names, suffixes, metadata, prompts and paths", "no such code: hone serves no page. Every reply is JSON or text, and says that it may not be taken for a page")
	s := start(t, newHome(t))
	markup := `<img src=x onerror=alert(1)>`
	file := s.upload(t, markup+".jsonl", rows(2))
	var j job
	s.must(t, http.MethodPost, "/v1/fine_tuning/jobs", map[string]any{"model": tiny, "training_file": file, "suffix": "x", "metadata": map[string]string{"note": markup}}, &j)
	paths := []string{"/v1/files", "/v1/files/" + file, "/v1/files/" + file + "/content", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/" + j.ID, "/v1/fine_tuning/jobs/" + j.ID + "/events",
		"/v1/models", "/v1/models/%3Cimg%20src=x%20onerror=alert(1)%3E", "/%3Cscript%3E", "/", "/index.html", "/health", "/ready", "/openapi.json"}
	for _, path := range paths {
		resp, err := get(t.Context(), s.url+path)
		if err != nil {
			t.Fatal(err)
		}
		kind := resp.Header.Get("Content-Type")
		if strings.Contains(kind, "html") || strings.Contains(kind, "svg") || strings.Contains(kind, "xml") || kind == "" {
			t.Errorf("%s is %q", path, kind)
		}
		if resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s (%s) may be taken for something else: %v", path, kind, resp.Header)
		}
		resp.Body.Close()
		p.inject(1)
	}
	p.found("%d replies, none of them a page, all with nosniff", len(paths))
}

// TestJobFields puts what shells, paths and command lines take into every text of a job.
func TestJobFields(t *testing.T) {
	p := prove(t, "S11", "commands, paths, addresses and flags in every text of a fine-tuning job", "no process but runners and trainers of hone, nothing outside the data directory is read or written")
	v := newVault(t)
	s := start(t, v.home, append(v.environment(), "HONE_LOG_LEVEL=error")...)
	file := s.upload(t, "train.jsonl", rows(4))
	opened := v.watch(t)
	// The server's descendants, all the while.
	var strange atomic.Value
	watched, ended := make(chan struct{}), make(chan struct{})
	var seen atomic.Int64
	go func() {
		defer close(ended)
		for {
			for _, pid := range s.children(t) {
				line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				words := strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
				if err != nil || len(line) == 0 || len(words) < 2 && filepath.Base(words[0]) == "hone" {
					continue
				}
				seen.Add(1)
				if words[1] != "runner" && words[1] != "trainer" && words[1] != "serve" || len(words) > 2 && words[1] != "serve" {
					strange.Store(strings.Join(words, " "))
				}
			}
			select {
			case <-watched:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	touch := "touch " + v.dir + "/outside/pwned"
	injections := []string{";" + touch, "$(" + touch + ")", "`" + touch + "`", "| " + touch, "&& " + touch, "../../secret", v.dir + "/secret", "file://" + v.dir + "/secret", "/proc/self/environ", "\n" + touch + "\n", "--config=" + v.dir + "/secret", "-o", "a\x00b", "http://127.0.0.1:1/x", "%s%n", "{{ 7*7 }}"}
	started, refused := 0, 0
	for _, text := range injections {
		job := func(extra map[string]any) map[string]any {
			body := map[string]any{"model": tiny, "training_file": file, "hone": map[string]any{"max_steps": 1, "r": 2}}
			maps.Copy(body, extra)
			return body
		}
		bodies := []map[string]any{job(map[string]any{"model": text}), job(map[string]any{"training_file": text}), job(map[string]any{"validation_file": text}),
			job(map[string]any{"suffix": text}), job(map[string]any{"metadata": map[string]string{"a": text}}), job(map[string]any{"metadata": map[string]string{text: "a"}}),
			job(map[string]any{"method": map[string]any{"type": text}}), job(map[string]any{"integrations": []any{map[string]any{"type": text}}})}
		for _, option := range []string{"device", "lr_scheduler_type", "memory", "eval_strategy", "choices", "long_rows", "loss_type", "init_lora_weights", "target_modules", "question_template", "reward_code", "dataset_source"} {
			bodies = append(bodies, job(map[string]any{"hone": map[string]any{"max_steps": 1, option: text}}))
		}
		for i, body := range bodies {
			status, answer, err := s.do(t.Context(), http.MethodPost, "/v1/fine_tuning/jobs", body, nil)
			if err != nil {
				t.Fatal(err)
			}
			if status != http.StatusOK {
				mustRefuse(t, fmt.Sprintf("%q in body %d", text, i), status, answer)
				refused++
			} else {
				started++
			}
			p.inject(1)
		}
	}
	// What was taken is trained: nothing may happen then, either.
	var page struct{ Data []job }
	s.must(t, http.MethodGet, "/v1/fine_tuning/jobs?limit=100", nil, &page)
	for _, j := range page.Data {
		s.await(t, j.ID, 2*time.Minute)
		_, text, _ := s.do(t.Context(), http.MethodGet, "/v1/fine_tuning/jobs/"+j.ID+"/events?limit=100", nil, nil)
		if strings.Contains(text, secret) {
			t.Errorf("the events of %s have the secret", j.ID)
		}
	}
	close(watched)
	<-ended
	if words := strange.Load(); words != nil {
		t.Errorf("the server started %v", words)
	}
	if seen.Load() == 0 {
		t.Error("no trainer was seen")
	}
	if opened() {
		t.Error("a file beside the data directory was opened")
	}
	if _, err := os.ReadFile(filepath.Join(v.dir, "secret")); err != nil || !opened() {
		t.Errorf("what is opened is not seen, %v", err)
	}
	if v.outside(t) != v.before {
		t.Error("something changed outside the data directory")
	}
	err := filepath.WalkDir(v.home, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // it went meanwhile
		}
		if data, err := os.ReadFile(path); err == nil && bytes.Contains(data, []byte(secret)) {
			t.Errorf("%s has the secret", path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	p.found("%d refused; %d kept the text as a text and trained; no other process, the files beside the data directory were not opened (inotify), the secret is in no event and no file, the tree has the same hash", refused, started)
}
