package ggml

import (
	"path/filepath"
	"testing"

	"github.com/hone-llm/hone/internal/headercheck"
)

// The declarations in api.h are compiled against the headers of the ollama module that is linked.
func TestHeaderAgreesWithLibrary(t *testing.T) {
	t.Parallel()
	dir, err := headercheck.ModuleDir("github.com/ollama/ollama")
	if err != nil {
		t.Fatal(err)
	}
	err = headercheck.Compare("api.h", []string{"ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpu.h"}, []string{
		filepath.Join(dir, "ml/backend/ggml/ggml/include"),
	})
	if err != nil {
		t.Fatal(err)
	}
}
