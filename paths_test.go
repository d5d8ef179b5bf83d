package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestNoPathsFromRequests: the packages that see what a request says make no paths of it and open no files. Ids and names
// become paths in the packages that own the directories: store.blobPath, models.CheckName's callers and adapters.Registry.
func TestNoPathsFromRequests(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{"server", "internal/batch", "internal/wire"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", dir, files, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range file.Imports {
				if path, _ := strconv.Unquote(i.Path.Value); slices.Contains([]string{"path/filepath", "path", "io/ioutil"}, path) {
					t.Errorf("%s imports %s: what a request names is for the package that owns the directory", name, path)
				}
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					if f, ok := call.Fun.(*ast.SelectorExpr); ok {
						if of, ok := f.X.(*ast.Ident); ok && of.Name == "os" {
							t.Errorf("%s calls os.%s: the packages that see requests open no files", set.Position(n.Pos()), f.Sel.Name)
						}
					}
				}
				return true
			})
		}
	}
}

// TestOnePathOfDigests: one function of the store turns a digest into a path, and it checks the digest.
func TestOnePathOfDigests(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("internal/store/*.go")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, data, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && strings.Contains(string(data[f.Pos()-1:f.End()-1]), "digest[:2]") {
				found = append(found, f.Name.Name)
			}
		}
	}
	if !slices.Equal(found, []string{"blobPath"}) {
		t.Errorf("a digest becomes a path in %v, expected blobPath alone", found)
	}
}
