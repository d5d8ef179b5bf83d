package doctor

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/models"
)

// plant makes a file system of the given files.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// expect compares a check's status, and looks for texts in what it found (want) and in its fix.
func expect(t *testing.T, c Check, status Status, want, fix string) {
	t.Helper()
	if c.Status != status || !strings.Contains(c.Found, want) || !strings.Contains(c.Fix, fix) {
		t.Errorf("%+v\nwant %s, found %q, fix %q", c, status, want, fix)
	}
	if (c.Fix == "") != (c.Status == OK) {
		t.Errorf("%+v: a fix goes with what is not well", c)
	}
	if strings.Contains(c.Found+c.Fix, "\n") {
		t.Errorf("%+v: more than a line", c)
	}
}

func TestGPU(t *testing.T) {
	t.Parallel()
	const version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version: 12.2.0\n"
	card := map[string]string{"sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n", "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n"}
	with := func(more ...string) map[string]string {
		files := map[string]string{}
		for k, v := range card {
			files[k] = v
		}
		for _, name := range more {
			files[name] = version
		}
		return files
	}
	library := filepath.Join(plant(t, map[string]string{"libggml-cuda.so": ""}), "libggml-cuda.so")
	looked := Engine{Looked: true, Library: library, NoGPU: "no GPU: " + library + " finds no device: driver too old"}
	for _, test := range []struct {
		name   string
		files  map[string]string
		engine Engine
		err    error
		status Status
		want   string
		fix    string
	}{
		{"nothing", nil, Engine{Looked: true}, nil, OK, "none", ""},
		{"AMD", map[string]string{"sys/bus/pci/devices/0/class": "0x030000", "sys/bus/pci/devices/0/vendor": "0x1002"}, Engine{}, nil, OK, "AMD", ""},
		{"NVIDIA's sound", map[string]string{"sys/bus/pci/devices/0/class": "0x040300", "sys/bus/pci/devices/0/vendor": "0x10de"}, Engine{}, nil, OK, "none", ""},
		{"no driver", card, Engine{Looked: true}, nil, Warning, "without a driver", "install NVIDIA's driver"},
		{"container", with("proc/driver/nvidia/version"), Engine{Looked: true}, nil, Warning, "(driver 570.124.06) is not used: there is no /dev/nvidia0", "--gpus all"},
		{"no library", with("proc/driver/nvidia/version", "dev/nvidia0"), Engine{Looked: true, Library: "/none/libggml-cuda.so"}, nil, Warning, "not built (/none/libggml-cuda.so)", "make cuda"},
		{"no device", with("proc/driver/nvidia/version", "dev/nvidia0"), looked, nil, Warning, "is not used: " + library + " finds no device: driver too old", "nvidia-smi"},
		{"crash", with("proc/driver/nvidia/version", "dev/nvidia0"), Engine{}, errors.New("signal: aborted"), Warning, "signal: aborted", "device: cpu"},
		{"hang", with("dev/nvidia3"), Engine{}, context.DeadlineExceeded, Warning, "no answer in time", "nvidia-smi"},
		{"Windows", map[string]string{"dev/dxg": ""}, looked, nil, Warning, "finds no device", ""},
		{"used", with("proc/driver/nvidia/version", "dev/nvidia0"), Engine{GPUs: []GPU{{"NVIDIA H100", 79 << 30, 80 << 30}}}, nil, OK, "NVIDIA H100, 79 GiB free of 80 GiB; driver 570.124.06", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Root: plant(t, test.files)}
			expect(t, o.gpu(test.engine, test.err), test.status, test.want, test.fix)
		})
	}
}

func TestDevices(t *testing.T) {
	t.Parallel()
	none := Engine{}
	two := Engine{GPUs: []GPU{{"small", 1 << 30, 8 << 30}, {"large", 40 << 30, 80 << 30}}}
	model := modelState{name: "m", size: 5 << 30}
	for _, test := range []struct {
		device string
		engine Engine
		model  modelState
		status Status
		want   string
	}{
		{"auto", none, model, OK, "the CPU (%s: auto; no GPU can be used)"},
		{"cpu", two, model, OK, "the CPU (%s: cpu)"},
		{"cuda", none, model, Problem, "%s is cuda, and no GPU can be used"},
		{"cuda", two, model, OK, "large (%s: cuda)"},
		{"auto", two, model, OK, "large, where the "},
	} {
		o := Options{Device: test.device, TrainerDevice: test.device}
		for key, c := range map[string]Check{"device": o.answers(test.engine, test.model), "trainer.device": o.jobs(test.engine)} {
			want := test.want
			if strings.Contains(want, "%s") {
				want = fmt.Sprintf(want, key)
			}
			expect(t, c, test.status, want, "")
		}
	}
	o := Options{Device: "auto"}
	expect(t, o.answers(two, modelState{name: "huge", size: 39 << 30}), OK, "the CPU: huge of 39 GiB does not fit into 40 GiB free on large", "")
}

func TestEngine(t *testing.T) {
	t.Parallel()
	features := func(built string) []Feature {
		var list []Feature
		for _, name := range []string{"sse4_2", "fma", "avx2", "avx512f", "avx512_vnni"} {
			list = append(list, Feature{name, strings.Contains(" "+built+" ", " "+name+" ")})
		}
		return list
	}
	info := func(flags string) cpu {
		root := plant(t, map[string]string{"cpuinfo": "processor\t: 0\nmodel name\t: Some 処理 CPU\nflags\t\t: " + flags + "\nprocessor\t: 1\nflags\t\t: other\n"})
		return readCPU(filepath.Join(root, "cpuinfo"))
	}
	const all = "sse4_2 fma avx2 avx512f avx512_vnni"
	for _, test := range []struct {
		name   string
		flags  string
		engine Engine
		err    error
		status Status
		want   string
		fix    string
	}{
		{"all", all, Engine{Features: features(all), OpenMP: true, Repack: true}, nil, OK, "built for fma, avx2, avx512f, avx512_vnni, with OpenMP, repacked 4-bit kernels", ""},
		{"another machine's", "sse4_2 fma avx2", Engine{Features: features(all), OpenMP: true}, nil, Problem, "built for avx512f, avx512_vnni, which this processor does not have", "HONE_MARCH"},
		{"portable", all, Engine{Features: features("sse4_2 fma avx2"), OpenMP: true, Repack: true}, nil, Warning, "without avx512f, avx512_vnni, which this processor has", "make build"},
		{"fits", "sse4_2 fma avx2", Engine{Features: features("sse4_2 fma avx2"), OpenMP: true, Repack: true}, nil, OK, "built for fma, avx2", ""},
		{"no flags", "sse4_2", Engine{Features: features("")}, nil, Warning, "baseline", "make build"},
		{"no repack", "sse4_2", Engine{Features: features(""), OpenMP: true}, nil, Warning, "repacked", "make build"},
		{"crash", all, Engine{}, errors.New("signal: illegal instruction\ncore dumped"), Problem, "illegal instruction; core dumped", "HONE_MARCH"},
		{"driver's crash", all, Engine{Features: features(all), OpenMP: true, Repack: true}, errors.New("signal: aborted"), OK, "built for", ""},
		{"unreadable", "", Engine{Features: features(all), OpenMP: true, Repack: true}, nil, OK, "built for", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			expect(t, engineCheck(info(test.flags), test.engine, test.err), test.status, test.want, test.fix)
		})
	}
	vnni := info(all)
	expect(t, layoutCheck(vnni, Engine{Layout: "packed/packed"}, nil), OK, "fastest", "")
	expect(t, layoutCheck(vnni, Engine{Layout: "f32/f32"}, nil), Warning, "f32/f32", "make build")
	expect(t, layoutCheck(info("avx2"), Engine{Layout: "f32/f32"}, nil), OK, "no avx512_vnni", "")
	expect(t, layoutCheck(vnni, Engine{}, errors.New("gone")), Warning, "gone", "engine")

	expect(t, (&Options{Cores: 2, Quota: 2}).processor(vnni), OK, "Some 処理 CPU, 2 cores", "")
	expect(t, (&Options{Cores: 8, Quota: 2}).processor(vnni), Warning, "allows 2 at a time, and 8 threads", "HONE_THREADS=2")
	expect(t, (&Options{Cores: 8, Quota: 2, Threads: 2}).processor(cpu{}), OK, "8 cores", "")
}

func TestRoom(t *testing.T) {
	t.Parallel()
	root := plant(t, map[string]string{"proc/meminfo": "MemTotal:       16777216 kB\nMemFree:         1 kB\n"})
	for _, test := range []struct {
		free, group int64
		status      Status
		want, fix   string
	}{
		{8 << 30, math.MaxInt64, OK, "8.0 GiB free of 16 GiB", ""},
		{8 << 30, math.MaxInt64 &^ 4095, OK, "8.0 GiB free of 16 GiB", ""}, // no limit, version 1
		{1 << 30, math.MaxInt64, Warning, "1.0 GiB free", "end other programs"},
		{8 << 30, 1 << 30, Warning, "leaves 1.0 GiB", "docker run --memory"},
		{8 << 30, 100 << 20, Problem, "leaves 100 MiB", "docker run --memory"},
	} {
		o := Options{Root: root, FreeMemory: test.free, GroupFree: test.group}
		expect(t, o.memory(modelState{}, holder{}), test.status, test.want, test.fix)
	}
	o := Options{Root: root, MemoryErr: errors.New("no such file")}
	expect(t, o.memory(modelState{}, holder{}), Warning, "not known", "/proc")

	o = Options{Root: root, FreeMemory: 10 << 30, GroupFree: math.MaxInt64}
	expect(t, o.memory(modelState{}, holder{}), OK, "models and jobs may take 9.0 GiB together (memory: auto)", "")
	expect(t, o.memory(modelState{}, holder{held: true}), OK, "(memory: auto) beside what the running server's have", "")
	o.Memory = 4 << 30
	expect(t, o.memory(modelState{name: "m", size: 3 << 30}, holder{}), OK, "may take 4.0 GiB together", "")
	expect(t, o.memory(modelState{name: "m", size: 5 << 30}, holder{}), Problem, "4.0 GiB", "raise memory: m alone has 5.0 GiB")
	o.Memory = 12 << 30
	expect(t, o.memory(modelState{}, holder{}), Warning, "12 GiB", "lower it")
	expect(t, o.memory(modelState{}, holder{held: true}), OK, "12 GiB", "")

	expect(t, diskCheck("/d", 60<<30, 100<<30), OK, "60 GiB free of 100 GiB at /d", "")
	expect(t, diskCheck("/d", 1<<30, 100<<30), Warning, "1.0 GiB", "HONE_HOME")
	expect(t, diskCheck("/d", 1<<20, 100<<30), Problem, "1.0 MiB", "HONE_HOME")
	o = Options{DataDir: filepath.Join(t.TempDir(), "not", "there")}
	expect(t, o.disk(), OK, "free of", "")
}

// lock holds the data directory's lock as a server does, as another open file, until the test ends.
func lock(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "hone.lock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString("4711\n"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
}

func TestDataDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	look := func(dir string) (Check, holder) {
		o := Options{DataDir: dir}
		return o.dataDirectory()
	}
	c, h := look(filepath.Join(dir, "new", "home"))
	expect(t, c, OK, "is made by the first start", "")
	c, _ = look(dir)
	expect(t, c, OK, "writable", "")
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 || h.held { // nothing stays
		t.Errorf("it left %v, %v", entries, err)
	}
	closed := filepath.Join(dir, "closed")
	if err := os.Mkdir(closed, 0o500); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 { // whom modes do not bind
		c, _ = look(filepath.Join(closed, "home"))
		expect(t, c, Problem, "cannot be made in "+closed, "HONE_HOME")
	}
	c, _ = look("/proc/self")
	expect(t, c, Problem, "/proc/self", "HONE_HOME")
	lock(t, dir)
	c, h = look(dir)
	expect(t, c, OK, "in use by hone process 4711", "")
	if diff := cmp.Diff(holder{true, 4711}, h, cmp.AllowUnexported(holder{})); diff != "" {
		t.Error(diff)
	}
}

func TestServer(t *testing.T) {
	t.Parallel()
	healthy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" {
			fmt.Fprint(w, `{"status":"ok"}`)
		}
	}))
	defer healthy.Close()
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	port := func(s *httptest.Server) int { return s.Listener.Addr().(*net.TCPAddr).Port }
	unused := httptest.NewServer(nil)
	free := port(unused)
	unused.Close()
	held := holder{true, 4711}
	for _, test := range []struct {
		host   string
		port   int
		holder holder
		status Status
		want   string
		fix    string
	}{
		{"127.0.0.1", free, holder{}, OK, "not running; port", ""},
		{"127.0.0.1", 0, holder{}, OK, "free port", ""},
		{"127.0.0.1", 0, held, OK, "hone process 4711 runs", ""},
		{"127.0.0.1", free, held, Warning, "hone process 4711 has the data directory, and nobody listens", "--base-url"},
		{"127.0.0.1", port(healthy), held, OK, "healthy at http://127.0.0.1:", ""},
		{"0.0.0.0", port(healthy), held, OK, "healthy at http://127.0.0.1:", ""},
		{"127.0.0.1", port(healthy), holder{}, Problem, "another data directory", "--port"},
		{"127.0.0.1", port(other), holder{}, Problem, "another program", "ss -ltnp"},
		{"127.0.0.1", port(other), held, Problem, "404", "SIGTERM"},
		{"192.0.2.1", free, holder{}, Problem, "192.0.2.1", "127.0.0.1"},
	} {
		o := Options{Root: t.TempDir(), Host: test.host, Port: test.port}
		expect(t, o.server(t.Context(), test.holder), test.status, test.want, test.fix)
	}
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "proc/4711"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/usr/bin/hone (deleted)", filepath.Join(root, "proc/4711/exe")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		models  []child.ModelState
		want    string
		failing bool
	}{
		{nil, "it tells its models to those who have a key: set HONE_API_KEY", false},
		{[]child.ModelState{}, "no model is in memory", false},
		{[]child.ModelState{
			{Model: "a", State: child.Ready, IdleSeconds: 61, MemoryBytes: 1 << 30}, {Model: "b", State: child.Ready, MemoryBytes: 2 << 30, Requests: 3},
		}, "a is ready (1.0 GiB, idle for 1m1s); b is ready (2.0 GiB, 3 requests)", false},
		{[]child.ModelState{{Model: "a", State: child.Loading, LoadedBytes: 1 << 30, TotalBytes: 4 << 30, Requests: 1}}, "a is loading (1.0 GiB of 4.0 GiB)", false},
		{[]child.ModelState{{Model: "a", State: child.Failed, Error: "it\ndied"}}, "a is failed (it; died)", true},
		{[]child.ModelState{{Model: "a", State: child.Waiting, Error: "no memory"}}, "a is waiting (no memory)", true},
	} {
		if got, failing := describeModels(test.models); got != test.want || failing != test.failing {
			t.Errorf("%q, %v, want %q, %v", got, failing, test.want, test.failing)
		}
	}
	o := Options{Root: root, Host: "127.0.0.1", Port: port(healthy)}
	expect(t, o.server(t.Context(), held), Warning, "replaced", "start it again")
}

// TestServerWithKeyAndTLS asks a server whose certificate is of another name and signed by nobody.
func TestServerWithKeyAndTLS(t *testing.T) {
	t.Parallel()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" {
			fmt.Fprint(w, `{"status":"ok"}`)
			return
		}
		fmt.Fprint(w, `{"status":"ok","models":[{"model":"a","state":"ready","idle_seconds":61}]}`)
	}))
	defer server.Close()
	dir := t.TempDir()
	cert, other := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "other.pem")
	for path, der := range map[string][]byte{cert: server.Certificate().Raw, other: []byte("another")} {
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	held := holder{true, 4711}
	o := Options{Root: dir, Host: "127.0.0.1", Port: server.Listener.Addr().(*net.TCPAddr).Port, CertFile: cert}
	expect(t, o.server(t.Context(), held), OK, "healthy at https://127.0.0.1:", "")
	expect(t, o.server(t.Context(), held), OK, "set HONE_API_KEY", "")
	o.Key = "secret"
	expect(t, o.server(t.Context(), held), OK, "a is ready", "")
	o.CertFile = other
	expect(t, o.server(t.Context(), held), Problem, "not that of tls.cert_file", "SIGTERM")
}

func TestModel(t *testing.T) {
	t.Parallel()
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) }))
	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	gone := httptest.NewServer(nil)
	gone.Close()
	defer hub.Close()
	defer broken.Close()
	options := func(endpoint string) Options {
		cache, err := models.NewCache(models.CacheOptions{Dir: t.TempDir(), Endpoint: endpoint, Pip: []string{"some", "pip"}})
		if err != nil {
			t.Fatal(err)
		}
		return Options{DataDir: t.TempDir(), DefaultModel: models.DefaultModel, Cache: cache}
	}
	o := options(hub.URL)
	c, ok := o.hub(t.Context())
	expect(t, c, OK, hub.URL+" answers", "")
	if !ok {
		t.Error("a hub that wants a login is there")
	}
	for _, url := range []string{broken.URL, gone.URL} {
		o := options(url)
		c, ok := o.hub(t.Context())
		expect(t, c, Warning, url+" cannot be reached", "HF_ENDPOINT")
		if ok {
			t.Error(url)
		}
	}
	c, _ = o.pip(t.Context())
	expect(t, c, OK, "some pip", "")
	none := Options{CacheErr: errors.New("HF_ENDPOINT is \"x\"")}
	c, _ = none.hub(t.Context())
	expect(t, c, Problem, "HF_ENDPOINT", "correct")

	m := o.lookForModel(t.Context())
	expect(t, m.check(true, false), OK, "SmolLM2-135M-Instruct (94 MiB) is not there; the first start fetches it", "")
	expect(t, m.check(false, true), OK, "fetches it", "")
	expect(t, m.check(false, false), Problem, "does not start", "hone models add FILE.gguf --name SmolLM2-135M-Instruct")
	o.DefaultModel = "owner/repo/file.gguf"
	expect(t, o.lookForModel(t.Context()).check(false, true), Problem, "file is not there and cannot be fetched", "")
	o.DefaultModel = "unheard-of"
	expect(t, o.lookForModel(t.Context()).check(true, true), Problem, "unheard-of", "default_model")
	o.DefaultModel = ""
	expect(t, o.lookForModel(t.Context()).check(false, false), OK, "none is configured", "")
}

// TestRun looks at a whole machine, and at the statuses together.
func TestRun(t *testing.T) {
	t.Parallel()
	o := Options{
		DataDir: t.TempDir(), Host: "127.0.0.1", Device: "auto", TrainerDevice: "auto", Cores: 1, FreeMemory: 4 << 30, GroupFree: math.MaxInt64,
		CacheErr: errors.New("no cache"), Root: t.TempDir(),
		Engine: func(context.Context) (Engine, error) {
			return Engine{Features: []Feature{{"avx2", true}}, OpenMP: true, Repack: true, Layout: "f32/f32", Looked: true}, nil
		},
	}
	var names []string
	checks := Run(t.Context(), o)
	for _, c := range checks {
		names = append(names, c.Name+" "+string(c.Status))
	}
	want := []string{"processor ok", "engine ok", "job layout ok", "GPU ok", "answers on ok", "jobs on ok", "memory ok", "disk ok", "data directory ok", "server ok",
		"default model ok", "model hub problem", "pip ok"}
	for i, w := range want { // what this machine's disk has is not the test's
		if strings.HasPrefix(w, "disk") {
			names[i], want[i] = "", ""
		}
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
	if Worst(checks) != Problem || Worst([]Check{{Status: OK}, {Status: Warning}, {Status: OK}}) != Warning || Worst(nil) != OK {
		t.Error("the worst status")
	}
}
