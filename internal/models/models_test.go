package models

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/gguf"
)

// tinyModel is a valid llama of one layer, and its bytes change with seed.
func tinyModel(t *testing.T, seed byte) []byte {
	t.Helper()
	const embd, ff, vocab = 8, 16, 260
	var tokens []string
	for b := range 256 {
		tokens = append(tokens, fmt.Sprintf("<0x%02X>", b))
	}
	for i := len(tokens); i < vocab; i++ {
		tokens = append(tokens, fmt.Sprintf("word%d", i))
	}
	var tensors []gguf.TensorData
	add := func(name string, shape ...int64) {
		n := int64(1)
		for _, d := range shape {
			n *= d
		}
		tensors = append(tensors, gguf.TensorData{Name: name, Shape: shape, Type: gguf.F32, Data: bytes.Repeat([]byte{0, 0, seed, 0}, int(n))})
	}
	add("token_embd.weight", embd, vocab)
	add("output_norm.weight", embd)
	for _, name := range []string{"attn_norm", "ffn_norm"} {
		add("blk.0."+name+".weight", embd)
	}
	for _, name := range []string{"attn_q", "attn_k", "attn_v", "attn_output"} {
		add("blk.0."+name+".weight", embd, embd)
	}
	add("blk.0.ffn_gate.weight", embd, ff)
	add("blk.0.ffn_up.weight", embd, ff)
	add("blk.0.ffn_down.weight", ff, embd)
	var out bytes.Buffer
	err := gguf.Write(&out, []gguf.KeyValue{
		{Key: "general.architecture", Value: "llama"},
		{Key: "llama.block_count", Value: uint32(1)},
		{Key: "llama.context_length", Value: uint32(128)},
		{Key: "llama.embedding_length", Value: uint32(embd)},
		{Key: "llama.feed_forward_length", Value: uint32(ff)},
		{Key: "llama.attention.head_count", Value: uint32(2)},
		{Key: "llama.attention.layer_norm_rms_epsilon", Value: float32(1e-5)},
		{Key: "tokenizer.ggml.model", Value: "llama"},
		{Key: "tokenizer.ggml.tokens", Value: tokens},
	}, tensors)
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func write(t *testing.T, path string, data []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func openStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "models"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// left are the names in a directory.
func left(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestStore(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	data := tinyModel(t, 1)
	src := write(t, filepath.Join(t.TempDir(), "Tiny-1.5.Q4.gguf"), data)
	tokenizer := write(t, filepath.Join(t.TempDir(), "t.json"), []byte(`{"model":{"type":"BPE"}}`))
	template := write(t, filepath.Join(t.TempDir(), "c.jinja"), []byte("{{ messages }}"))

	var last int64
	added, err := s.Add(t.Context(), src, AddOptions{Tokenizer: tokenizer, ChatTemplate: template, Progress: func(done, total int64) {
		if done < last || total != int64(len(data)) {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last = done
	}})
	if err != nil {
		t.Fatal(err)
	}
	if last != int64(len(data)) {
		t.Errorf("progress ended at %d of %d", last, len(data))
	}
	got, err := s.Get("Tiny-1.5.Q4")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(added, got); diff != "" {
		t.Errorf("Get after Add (-added +got):\n%s", diff)
	}
	digest, err := fileDigest(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	want := Manifest{Name: "Tiny-1.5.Q4", Digest: digest, Bytes: int64(len(data)), Source: src, Architecture: "llama",
		Parameters: 8*260 + 3*8 + 4*64 + 3*128, ContextTokens: 128, Quantisation: "F32", CreatedAt: got.CreatedAt}
	if diff := cmp.Diff(want, got.Manifest); diff != "" || time.Since(time.Unix(got.CreatedAt, 0)) > time.Minute {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{WeightsFile, ChatTemplateFile, ManifestFile, TokenizerFile}, left(t, got.Dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}

	// The model does not change with the original.
	write(t, src, []byte("gone"))
	if now, err := fileDigest(t.Context(), got.Weights()); err != nil || now != digest {
		t.Errorf("after a change of the original the weights have sha256 %s, %v; want %s", now, err, digest)
	}

	other := write(t, filepath.Join(t.TempDir(), "b.gguf"), tinyModel(t, 2))
	if _, err := s.Add(t.Context(), other, AddOptions{Name: "Tiny-1.5.Q4"}); !errors.Is(err, ErrExists) {
		t.Errorf("second Add: error %v, want ErrExists", err)
	}
	if _, err := s.Add(t.Context(), other, AddOptions{Name: "another"}); err != nil {
		t.Fatal(err)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 || list[0].Name != "another" || list[1].Name != "Tiny-1.5.Q4" {
		t.Errorf("List = %v, %v", list, err)
	}
	// Another store on the same directory sees what this one does.
	s2, err := Open(s.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("another"); err != nil {
		t.Fatal(err)
	}
	if _, err := s2.Get("another"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of a removed model: error %v, want ErrNotFound", err)
	}
	if err := s.Remove("another"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Remove of a removed model: error %v, want ErrNotFound", err)
	}

	// A damaged model is left out of the list, Get says why, and it can be removed.
	if err := os.Truncate(got.Weights(), 100); err != nil {
		t.Fatal(err)
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("List with a damaged model = %v, %v", list, err)
	}
	if _, err := s.Get(got.Name); err == nil || errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "100 bytes") {
		t.Errorf("Get of a damaged model: error %v, want its size", err)
	}
	if err := s.Remove(got.Name); err != nil {
		t.Error(err)
	}
	if names := left(t, s.dir); len(names) != 0 {
		t.Errorf("%v are left", names)
	}
}

func TestAddRefuses(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	dir := t.TempDir()
	good := write(t, filepath.Join(dir, "good.gguf"), tinyModel(t, 1))
	truncated := write(t, filepath.Join(dir, "truncated.gguf"), tinyModel(t, 1)[:3000])
	text := write(t, filepath.Join(dir, "text.gguf"), []byte("hello"))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context
		path string
		opts AddOptions
		is   func(error) bool
	}{
		{"truncated", t.Context(), truncated, AddOptions{}, func(err error) bool { return errors.As(err, new(*gguf.FormatError)) }},
		{"no model", t.Context(), text, AddOptions{}, func(err error) bool { return errors.As(err, new(*gguf.FormatError)) }},
		{"missing", t.Context(), filepath.Join(dir, "gone.gguf"), AddOptions{}, func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
		{"name", t.Context(), good, AddOptions{Name: "a/b"}, func(err error) bool { return errors.As(err, new(*NameError)) }},
		{"digest", t.Context(), good, AddOptions{digest: "ab"}, func(err error) bool { return errors.As(err, new(*DigestError)) }},
		{"tokenizer", t.Context(), good, AddOptions{Tokenizer: text}, func(err error) bool { return strings.Contains(err.Error(), "tokenizer.json") }},
		{"chat template", t.Context(), good, AddOptions{ChatTemplate: dir}, func(err error) bool { return strings.Contains(err.Error(), "chat template") }},
		{"cancelled", cancelled, good, AddOptions{}, func(err error) bool { return errors.Is(err, context.Canceled) }},
	} {
		if _, err := s.Add(tt.ctx, tt.path, tt.opts); err == nil || !tt.is(err) {
			t.Errorf("%s: error %v", tt.name, err)
		}
		if names := left(t, s.dir); len(names) != 0 {
			t.Errorf("%s: %v are left", tt.name, names)
		}
	}
}

func TestCheckName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"a", "SmolLM2-135M-Instruct", "qwen2.5_0.5b", "7B", strings.Repeat("a", 96), "gpt-4", "o2"} {
		if err := CheckName(name); err != nil {
			t.Errorf("CheckName(%q) = %v", name, err)
		}
	}
	s := openStore(t)
	write(t, filepath.Join(filepath.Dir(s.dir), "outside", ManifestFile), []byte("{}"))
	for _, name := range []string{"", ".", "..", "../outside", "a/b", `a\b`, "a:b", "ft:a", "ft-x", "FTX", "o1", "o3-mini", "O4", "gpt-5o",
		".hidden", "-a", "_a", "a b", "a\x00", "a\n", "é", strings.Repeat("a", 97), "%2e%2e", "/etc"} {
		if err := CheckName(name); !errors.As(err, new(*NameError)) {
			t.Errorf("CheckName(%q) = %v, want *NameError", name, err)
		}
		if _, err := s.Get(name); !errors.Is(err, ErrNotFound) {
			t.Errorf("Get(%q): error %v, want ErrNotFound", name, err)
		}
		if err := s.Remove(name); !errors.Is(err, ErrNotFound) {
			t.Errorf("Remove(%q): error %v, want ErrNotFound", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(s.dir), "outside", ManifestFile)); err != nil {
		t.Error(err)
	}
}

func TestParseSource(t *testing.T) {
	t.Parallel()
	if s, err := ParseSource("smollm2-135m-instruct"); err != nil || s.Name != DefaultModel {
		t.Errorf("ParseSource of the default model = %v, %v", s, err)
	}
	want := Source{Name: "Qwen2.5-0.5B.Q8_0", Repo: "owner/Some-GGUF", Revision: "main", File: "sub/Qwen2.5-0.5B.Q8_0.gguf"}
	if s, err := ParseSource("owner/Some-GGUF/sub/Qwen2.5-0.5B.Q8_0.gguf"); err != nil || s != want {
		t.Errorf("ParseSource = %+v, %v; want %+v", s, err, want)
	}
	for _, bad := range []string{"", "llama", "owner/repo", "owner/repo/file.bin", "../../x.gguf", "a/../x.gguf", "a/b/c d.gguf",
		"https://host/a/b.gguf", "a//b.gguf", "a/b/?x.gguf", "a/b/x#.gguf", "/a/b.gguf"} {
		if s, err := ParseSource(bad); err == nil {
			t.Errorf("ParseSource(%q) = %+v, want an error", bad, s)
		}
	}
}
