package llama

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/modeltest"
)

func loadModel(t testing.TB, o ModelOptions) *Model {
	t.Helper()
	Open(Options{})
	m, err := LoadModel(modeltest.Path(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func TestVocabulary(t *testing.T) {
	m := loadModel(t, ModelOptions{VocabularyOnly: true})
	if got := m.VocabularySize(); got != 49152 {
		t.Errorf("vocabulary size %d, want 49152", got)
	}
	if got := m.TrainingContext(); got != 8192 {
		t.Errorf("training context %d, want 8192", got)
	}
	if got, ok := m.Metadata("general.architecture"); !ok || got != "llama" {
		t.Errorf("general.architecture = %q, %v", got, ok)
	}
	if got, ok := m.Metadata("general.nothing"); ok {
		t.Errorf("a key that is not there gave %q", got)
	}
	if !strings.Contains(m.ChatTemplate(), "<|im_start|>") {
		t.Errorf("chat template %q", m.ChatTemplate())
	}
	eos, ok := m.EOS()
	if !ok || !m.IsEndOfGeneration(eos) || !m.IsControl(eos) || string(m.Piece(eos)) != "<|im_end|>" {
		t.Errorf("EOS %d %q, present %v", eos, m.Piece(eos), ok)
	}
	for _, text := range []string{"", "Hello, world", "  spaces \n\t", "中文，标点。", "é🎉\x00", strings.Repeat("long ", 5000)} {
		tokens, err := m.Tokenize(text, false, false)
		if err != nil {
			t.Fatalf("%.20q: %v", text, err)
		}
		var back strings.Builder
		for _, token := range tokens {
			back.Write(m.Piece(token))
		}
		if back.String() != text {
			t.Errorf("pieces of %.40q give %.40q", text, back.String())
		}
	}
	special, err := m.Tokenize("<|im_end|>", false, true)
	if err != nil || len(special) != 1 || special[0] != eos {
		t.Errorf("<|im_end|> as a special token: %v, %v", special, err)
	}
	plain, err := m.Tokenize("<|im_end|>", false, false)
	if err != nil || len(plain) < 2 {
		t.Errorf("<|im_end|> as plain text: %v, %v", plain, err)
	}
	for _, token := range []engine.Token{-1, 49152, 1 << 30} {
		if m.Piece(token) != nil || m.IsControl(token) || m.IsEndOfGeneration(token) {
			t.Errorf("token %d is outside of the vocabulary and has properties", token)
		}
	}
}

func TestLoadModelSaysWhy(t *testing.T) {
	Open(Options{})
	path := filepath.Join(t.TempDir(), "bad.gguf")
	if err := os.WriteFile(path, []byte("not a model"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + ".missing"} {
		_, err := LoadModel(p, ModelOptions{})
		if err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("error %v does not name the file", err)
		}
		t.Log(err)
	}
}

func TestClosedModel(t *testing.T) {
	m := loadModel(t, ModelOptions{VocabularyOnly: true})
	m.Close()
	m.Close()
	(*Model)(nil).Close()
	if _, err := m.Tokenize("x", false, false); !errors.Is(err, ErrClosed) {
		t.Errorf("Tokenize after Close: %v", err)
	}
	if m.Piece(1) != nil || m.VocabularySize() != 0 || m.ChatTemplate() != "" {
		t.Error("a closed model has properties")
	}
}
