package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/hone-llm/hone"

// serveHalf is what `hone serve` runs: it must neither crash with the engine nor need a C compiler.
var serveHalf = []string{
	"server", "client", "finetune", "adapters", "configs",
	"internal/store", "internal/wire", "internal/child", "internal/models", "internal/gguf", "internal/lora", "internal/durable",
	"internal/doctor", "internal/memory", "internal/batch", "internal/fsck",
}

// forbidden says which packages of this module a package must not reach, also through others.
var forbidden = []struct {
	from   []string
	to     []string
	reason string
}{
	{
		from:   serveHalf,
		to:     []string{"internal/runner", "internal/train", "internal/llama", "internal/ggml", "internal/graph", "internal/llguidance"},
		reason: "a GGML_ASSERT or a hostile file must kill a child, never the server",
	},
	{
		from:   serveHalf,
		to:     []string{"internal/prompt", "internal/dataset"},
		reason: "templates and training files are hostile input of unbounded cost; they are rendered and tokenized in the children, under limits",
	},
	{
		from:   serveHalf,
		to:     []string{"internal/app", "internal/cli"},
		reason: "wiring depends on the parts, not the parts on their wiring",
	},
	{
		from:   []string{"internal/wire"},
		to:     []string{"server", "client", "finetune", "adapters", "configs", "internal/store", "internal/child", "internal/models", "internal/gguf"},
		reason: "wire is the bottom: the types that everybody shares",
	},
	{
		from:   []string{"client"},
		to:     []string{"server", "finetune", "adapters", "configs", "internal/store", "internal/child", "internal/models"},
		reason: "users import client; it must not bring the server along",
	},
	{
		from:   []string{"internal/engine"},
		to:     []string{"internal/ggml", "internal/llama", "internal/graph", "internal/llguidance"},
		reason: "engine holds the plain types that engines implement",
	},
	{
		from:   []string{"internal/runner", "internal/train", "internal/prompt", "internal/dataset", "internal/graph", "internal/ggml", "internal/llama"},
		to:     []string{"server", "finetune", "internal/app", "internal/cli"},
		reason: "a child knows its own work and the protocol, nothing of the server's state",
	},
	{
		from:   []string{"internal/runner", "internal/train", "internal/prompt", "internal/dataset", "internal/graph", "internal/ggml", "internal/llama"},
		to:     []string{"adapters", "internal/store"},
		reason: "a child is told files and identifiers; what they mean to the server is not its business",
	},
}

// importers says who alone may import a package of this module.
var importers = []struct {
	of     string
	by     []string
	reason string
}{
	{"configs", []string{"", "internal/cli", "internal/app"}, "packages take their own Options; only the wiring reads files and environment"},
	{"internal/app", []string{"", "internal/cli"}, "app is the top of the parts"},
	{"internal/cli", []string{""}, "the command is the entry, not a library"},
	{"internal/llguidance", []string{"internal/runner"}, "constraints are the runner's"},
	{"internal/reference", []string{"internal/engine/enginetest"}, "the oracle of the tests is too slow for anything else"},
	{"internal/engine/enginetest", nil, "a suite is called by tests"},
}

// standardOnly are packages that import the standard library only.
var standardOnly = map[string]string{
	"internal/wire":   "client re-exports its types: whoever imports client must not inherit a dependency for them",
	"internal/engine": "plain types",
}

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
	CgoFiles   []string
	Standard   bool
}

// TestDependencies keeps the direction of imports that ARCHITECTURE.md describes.
func TestDependencies(t *testing.T) {
	packages := listPackages(t)
	ours := func(name string) string { return strings.TrimSuffix(module+"/"+name, "/") }

	for _, rule := range forbidden {
		for _, from := range rule.from {
			for _, p := range under(packages, ours(from)) {
				for _, to := range rule.to {
					if i := slices.IndexFunc(p.Deps, func(d string) bool { return within(d, ours(to)) }); i >= 0 {
						t.Errorf("%s depends on %s: %s", p.ImportPath, p.Deps[i], rule.reason)
					}
				}
			}
		}
	}
	for _, from := range serveHalf {
		for _, p := range under(packages, ours(from)) {
			for _, dep := range append([]string{p.ImportPath}, p.Deps...) {
				if d := packages[dep]; d != nil && !d.Standard && len(d.CgoFiles) > 0 {
					t.Errorf("%s depends on %s, which is cgo: serve's half builds without a C compiler", p.ImportPath, dep)
				}
			}
		}
	}
	for _, rule := range importers {
		for _, p := range packages {
			if slices.ContainsFunc(p.Imports, func(i string) bool { return within(i, ours(rule.of)) }) &&
				!within(p.ImportPath, ours(rule.of)) &&
				!slices.ContainsFunc(rule.by, func(by string) bool {
					return p.ImportPath == ours(by) || by != "" && within(p.ImportPath, ours(by))
				}) {
				t.Errorf("%s imports %s: %s", p.ImportPath, rule.of, rule.reason)
			}
		}
	}
	for name, reason := range standardOnly {
		for _, i := range packages[ours(name)].Imports {
			if d := packages[i]; d != nil && !d.Standard {
				t.Errorf("%s imports %s: %s", name, i, reason)
			}
		}
	}
}

// within reports whether the package at path is root or below it.
func within(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}

func under(packages map[string]*goPackage, root string) []*goPackage {
	var found []*goPackage
	for _, p := range packages {
		if within(p.ImportPath, root) {
			found = append(found, p)
		}
	}
	slices.SortFunc(found, func(a, b *goPackage) int { return strings.Compare(a.ImportPath, b.ImportPath) })
	return found
}

// listPackages returns this module's packages and all that they depend on, by import path. cgo is on, so that cgo files
// are seen whatever the test itself is built with.
func listPackages(t *testing.T) map[string]*goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Imports,Deps,CgoFiles,Standard", "./...")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	packages := map[string]*goPackage{}
	decoder := json.NewDecoder(bytes.NewReader(out))
	for {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(fmt.Errorf("decode go list: %w", err))
		}
		packages[p.ImportPath] = &p
	}
	if packages[module] == nil {
		t.Fatalf("go list does not know %s", module)
	}
	return packages
}
