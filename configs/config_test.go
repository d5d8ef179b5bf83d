package configs

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var defaultRunner = Runner{
	IdleTimeout: 10 * time.Minute, Wait: time.Minute, HangTimeout: 2 * time.Minute, Engine: "auto", CacheType: "f16", GPUWeights: "stored", AdapterMemory: "0",
}

var defaultLimits = Limits{Body: "32MiB", HeaderTimeout: 10 * time.Second, BodyTimeout: 30 * time.Second, WriteTimeout: 2 * time.Minute}

func TestDefaultHasEveryKey(t *testing.T) {
	t.Setenv("XDG_DATA_HOME", "/data")
	got, err := Default()
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		DataDir: "/data/hone", Host: "127.0.0.1", Port: 8080, AllowedHosts: []string{}, CORSOrigins: []string{}, Keys: []Key{}, Limits: defaultLimits, DefaultModel: "SmolLM2-135M-Instruct",
		LoadTimeout: 5 * time.Minute, ShutdownGrace: 10 * time.Second, Device: "cpu", Memory: "auto", ContextOf: []string{}, Runner: defaultRunner,
		Trainer: Trainer{Device: "auto", Memory: "0", Cache: "4GiB"}, Log: Log{Level: "info", Format: "text"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	var keys []string
	collectKeys(reflect.TypeFor[Config](), "", &keys)
	for _, key := range keys {
		if !newViper().IsSet(key) {
			t.Errorf("default.yaml lacks %s", key)
		}
	}
	if n := len(newViper().AllKeys()); n != len(keys) {
		t.Errorf("default.yaml has %d keys, Config has %d", n, len(keys))
	}
}

func collectKeys(t reflect.Type, prefix string, keys *[]string) {
	for field := range t.Fields() {
		key := prefix + field.Tag.Get("mapstructure")
		if field.Type.Kind() == reflect.Struct {
			collectKeys(field.Type, key+".", keys)
			continue
		}
		*keys = append(*keys, key)
	}
}

func TestLoadOrder(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HONE_HOME", home)
	t.Setenv("HONE_THREADS", "3")
	t.Setenv("HONE_LOG_LEVEL", "debug")
	t.Setenv("HONE_ALLOWED_HOSTS", "a.example,b.example")
	t.Setenv("HONE_MODEL_CONTEXT_TOKENS", "a=5,b.Q4_1=6")
	t.Setenv("HONE_RUNNER_IDLE_TIMEOUT", "0")
	t.Setenv("HONE_MEMORY", "4GiB")
	t.Setenv("HONE_API_KEY", "secret-of-the-user")
	runner := defaultRunner
	runner.IdleTimeout, runner.CacheType = 0, "q8_0"
	write(t, filepath.Join(home, FileName), "port: 1\nthreads: 2\nsequences: 2\nlog:\n  format: json\nshutdown_grace: 3s\nrunner:\n  cache_type: q8_0\n"+
		"keys:\n- {name: laptop, sha256: "+strings.Repeat("AB", 32)+", scopes: [infer]}\n")
	got, err := Load(Sources{Flags: map[string]any{"port": 9}})
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		DataDir: home, Host: "127.0.0.1", Port: 9, AllowedHosts: []string{"a.example", "b.example"}, CORSOrigins: []string{}, Limits: defaultLimits,
		APIKey: "secret-of-the-user", Keys: []Key{{Name: "laptop", SHA256: strings.Repeat("AB", 32), Scopes: []string{"infer"}}}, DefaultModel: "SmolLM2-135M-Instruct",
		Threads: 3, Sequences: 2, LoadTimeout: 5 * time.Minute, ShutdownGrace: 3 * time.Second, Device: "cpu", Memory: "4GiB", ContextOf: []string{"a=5", "b.Q4_1=6"}, Runner: runner,
		Trainer: Trainer{Device: "auto", Memory: "0", Cache: "4GiB"}, Log: Log{Level: "debug", Format: "json"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestLoadReportsEverythingAtOnce(t *testing.T) {
	t.Setenv("HONE_HOME", t.TempDir())
	path := filepath.Join(t.TempDir(), "own.yaml")
	write(t, path, "prot: 1\nport: 70000\nhost: 0.0.0.0\nlog:\n  level: loud\n  colour: yes\nthreads: -1\ntrainer:\n  device: tpu\n  memory: much\n"+
		"memory: 1MiB\nmodel_context_tokens: [a=1, b]\nrunner:\n  idle_timeout: -1s\n  wait: 0\n  hang_timeout: 1ms\n  engine: jet\n  cache_type: f8\n  cache_tokens: -1\n  queue: 100000\n  adapter_memory: lots\n")
	_, err := Load(Sources{File: path})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{path, `unknown key "prot"`, `unknown key "log.colour"`, "port: 70000", "host: 0.0.0.0", "HONE_API_KEY", "hone key new", "ssh -L", `log.level: "loud"`, "threads: -1", `trainer.device: "tpu"`, `trainer.memory: "much"`,
		`memory: "1MiB"`, `model_context_tokens: "b" is no NAME=TOKENS`, "runner.idle_timeout: -1s", "runner.wait: 0s", "runner.hang_timeout: 1ms", `runner.engine: "jet"`,
		`runner.cache_type: "f8"`, "runner.cache_tokens: -1", "runner.queue: 100000", `runner.adapter_memory: "lots"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in the error:\n%v", want, err)
		}
	}
}

func TestLoadWrongTypes(t *testing.T) {
	t.Setenv("HONE_HOME", t.TempDir())
	t.Setenv("HONE_PORT", "http")
	path := filepath.Join(t.TempDir(), "own.yaml")
	write(t, path, "shutdown_grace: long\n")
	_, err := Load(Sources{File: path})
	if err == nil || !strings.Contains(err.Error(), "port: http") || !strings.Contains(err.Error(), "shutdown_grace: long") {
		t.Errorf("error %v, want both keys named", err)
	}
}

func TestLoadFiles(t *testing.T) {
	t.Setenv("HONE_HOME", t.TempDir())
	if _, err := Load(Sources{File: filepath.Join(t.TempDir(), "none.yaml")}); err == nil {
		t.Error("a named file that does not exist was accepted")
	}
	path := filepath.Join(t.TempDir(), "bad.yaml")
	write(t, path, "port: [\n")
	if _, err := Load(Sources{File: path}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file that is not YAML: %v", err)
	}
	if _, err := Load(Sources{}); err != nil {
		t.Errorf("no file at all: %v", err)
	}
}

func TestTrainerMemory(t *testing.T) {
	for text, want := range map[string]int64{"": 0, "0": 0, "12GiB": 12 << 30, "1500000": 1_500_000, "16 GB": 16e9} {
		if got := (Trainer{Memory: text}).MemoryBytes(); got != want {
			t.Errorf("%q is %d bytes, want %d", text, got, want)
		}
	}
}

func TestMemoryAndContext(t *testing.T) {
	for text, want := range map[string]int64{"auto": 0, "64MiB": 64 << 20, "4GiB": 4 << 30} {
		if got := (&Config{Memory: text}).MemoryBytes(); got != want {
			t.Errorf("%q is %d bytes, want %d", text, got, want)
		}
	}
	got := (&Config{ContextOf: []string{"a = 5", "b.Q4_1=6"}}).ContextTokensOf()
	if diff := cmp.Diff(map[string]int{"a": 5, "b.Q4_1": 6}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for _, bad := range []string{"a", "=5", "a=", "a=0", "a=-1", "a=9999999"} {
		if _, err := (&Config{ContextOf: []string{bad}}).contextTokensOf(); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if _, err := (&Config{ContextOf: []string{"a=1", "a=2"}}).contextTokensOf(); err == nil {
		t.Error("two sizes of one model were accepted")
	}
}

func TestHost(t *testing.T) {
	cfg, err := Default()
	if err != nil {
		t.Fatal(err)
	}
	for host, ok := range map[string]bool{"127.0.0.1": true, "127.3.2.1": true, "::1": true, "localhost": true, "0.0.0.0": false, "::": false, "192.168.0.2": false, "example.com": false, "": false} {
		cfg.Host, cfg.APIKey = host, ""
		if got := cfg.Validate() == nil; got != ok {
			t.Errorf("host %q: accepted is %v, want %v", host, got, ok)
		}
		cfg.APIKey = "0123456789abcdef"
		if got := cfg.Validate() == nil; got != (host != "") {
			t.Errorf("host %q with a key: accepted is %v", host, got)
		}
		cfg.APIKey = "short"
		if got := cfg.Validate() == nil; got != ok {
			t.Errorf("host %q with a short key: accepted is %v, want %v", host, got, ok)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// An empty default model is a setting, in the environment too.
func TestNoDefaultModel(t *testing.T) {
	t.Setenv("HONE_HOME", t.TempDir())
	t.Setenv("HONE_DEFAULT_MODEL", "")
	cfg, err := Load(Sources{})
	if err != nil || cfg.DefaultModel != "" {
		t.Errorf("default model %q, error %v", cfg.DefaultModel, err)
	}
}
