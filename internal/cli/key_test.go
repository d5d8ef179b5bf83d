package cli

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/configs"
)

// TestKeyNew puts what the command prints where it says, and reads it.
func TestKeyNew(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HONE_HOME", home)
	var out, errs bytes.Buffer
	if code := Run(t.Context(), []string{"key", "new", "my-laptop.2", "--scopes", "infer,admin"}, strings.NewReader(""), &out, &errs); code != exitOK {
		t.Fatalf("exit code %d: %s", code, errs.String())
	}
	secret, rest, _ := strings.Cut(out.String(), "\n")
	if !strings.HasPrefix(secret, "sk-hone-") || len(secret) < 30 || strings.Contains(rest, secret) {
		t.Fatalf("printed %s", out.String())
	}
	_, yaml, _ := strings.Cut(rest, "\n\nkeys:")
	yaml, _, _ = strings.Cut("keys:"+yaml, "\n\n")
	if err := os.WriteFile(filepath.Join(home, configs.FileName), []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := configs.Load(configs.Sources{})
	if err != nil {
		t.Fatalf("%v in\n%s", err, yaml)
	}
	want := []configs.Key{{Name: "my-laptop.2", SHA256: fmt.Sprintf("%x", sha256.Sum256([]byte(secret))), Scopes: []string{"infer", "admin"}}}
	if diff := cmp.Diff(want, cfg.Keys); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for _, args := range [][]string{{"key", "new"}, {"key", "new", "a b"}, {"key", "new", "a", "--scopes", "root"}, {"key", "new", "a", "--scopes", ""}} {
		out.Reset()
		if code := Run(t.Context(), args, strings.NewReader(""), &out, &errs); code != exitUsage || strings.Contains(out.String(), "sk-hone") {
			t.Errorf("%v: exit code %d, %s", args, code, out.String())
		}
	}
}
