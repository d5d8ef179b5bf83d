// Package modeltest finds the default model for tests. Only tests import it.
package modeltest

import (
	"os"
	"path/filepath"
	"testing"
)

// Path returns the absolute path of the default model's GGUF: HONE_TEST_MODEL if it is set, else the file in the user's
// cache, where `make model` puts it. A test that needs the model and does not find it fails; it is not skipped.
//
// It reads the environment at every call, so a test that moves the cache (XDG_CACHE_HOME) calls it before.
func Path(t testing.TB) string {
	t.Helper()
	path := os.Getenv("HONE_TEST_MODEL")
	if path == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatalf("find the default model: %v; set HONE_TEST_MODEL to its file", err)
		}
		path = filepath.Join(cache, "hone", "models", "SmolLM2-135M-Instruct.Q4_1.gguf")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("the default model is missing: %v; run `make model` or set HONE_TEST_MODEL to its file", err)
	}
	return path
}
