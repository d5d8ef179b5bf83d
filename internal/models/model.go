// Package models owns the base models of this machine: a directory each under <data dir>/models, with the weights, what
// the user gave beside them, and a manifest. It also fetches models, through a cache that all data directories share.
//
//	store, err := models.Open(filepath.Join(home, "models"), models.Options{})
//	model, err := store.Add(ctx, "downloads/qwen2.5-0.5b.gguf", models.AddOptions{})
//	model, err = store.Get("SmolLM2-135M-Instruct") // ErrNotFound
//
// A file is validated in Go, by internal/gguf, before it gets a name that the engine could load.
package models

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/hone-llm/hone/internal/gguf"
)

// Names of the files of a model's directory.
const (
	WeightsFile      = "base.gguf"
	TokenizerFile    = "tokenizer.json" // #nosec G101 -- a file of words, no secret
	ChatTemplateFile = "chat_template.jinja"
	ManifestFile     = "manifest.json"
)

var (
	// ErrNotFound is returned for a name that no model has.
	ErrNotFound = errors.New("no such model")
	// ErrExists is returned for a name that is taken.
	ErrExists = errors.New("a model of this name exists")
)

// NameError says why a model cannot be called that.
type NameError struct{ Name, Reason string }

func (e *NameError) Error() string { return fmt.Sprintf("model name %q: %s", e.Name, e.Reason) }

// DigestError says that a file is not the one that it should be.
type DigestError struct{ File, Want, Got string } // sha256, hex

func (e *DigestError) Error() string {
	return fmt.Sprintf("%s has sha256 %s, expected %s: the file is damaged or another one", e.File, e.Got, e.Want)
}

// Manifest is manifest.json, the last file written into a model's directory.
type Manifest struct {
	Name          string `json:"name"`   // the directory's name and the model's on the wire
	Digest        string `json:"digest"` // sha256 of base.gguf, hex
	Bytes         int64  `json:"bytes"`  // of base.gguf
	Source        string `json:"source"` // where it came from: a path, or a file of the hub
	Architecture  string `json:"architecture"`
	Parameters    int64  `json:"parameters"`     // elements of all tensors
	ContextTokens int    `json:"context_tokens"` // longest sequence that the model was made for
	Quantisation  string `json:"quantisation"`   // type of most of the weights: Q4_1, F16
	CreatedAt     int64  `json:"created_at"`     // Unix seconds; when it came to this machine
}

// Model is a base model of the store.
type Model struct {
	Manifest
	Dir string // absolute
}

// Weights is the path of the model's GGUF file.
func (m Model) Weights() string { return filepath.Join(m.Dir, WeightsFile) }

var nameShape = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$`)

// reservedPrefixes: OpenAI's clients treat these names as reasoning models and refuse or rename request fields for
// them, and ft begins the names of tuned models.
var reservedPrefixes = []string{"o1", "o3", "o4", "gpt-5", "ft"}

// CheckName returns a *NameError unless a model may have this name.
func CheckName(name string) error {
	if !nameShape.MatchString(name) {
		return &NameError{name, "expected 1 to 96 letters, digits, '.', '_' and '-', the first a letter or digit"}
	}
	for _, p := range reservedPrefixes {
		if strings.HasPrefix(strings.ToLower(name), p) {
			return &NameError{name, fmt.Sprintf("names that begin with %q mean something else to OpenAI's clients; "+
				"give it another with --name", p)}
		}
	}
	return nil
}

// NameOf is the name that a model file gets if the user gives none: its own without .gguf.
func NameOf(file string) string {
	base := filepath.Base(file)
	if ext := filepath.Ext(base); strings.EqualFold(ext, ".gguf") {
		base = strings.TrimSuffix(base, ext)
	}
	return base
}

// describe reads what the manifest says about the weights themselves, and validates them.
func describe(path string) (Manifest, error) {
	f, err := gguf.Open(path)
	if err != nil {
		return Manifest{}, err
	}
	defer f.Close()
	if err := gguf.CheckModel(f); err != nil {
		return Manifest{}, err
	}
	m := Manifest{Bytes: f.Size}
	m.Architecture, _ = f.Metadata.String("general.architecture")
	context, _ := f.Metadata.Uint(m.Architecture + ".context_length")
	m.ContextTokens = int(context)
	bytesOf := map[gguf.Type]int64{}
	most := gguf.F32
	for _, t := range f.Tensors {
		m.Parameters += t.Elements()
		bytesOf[t.Type] += t.Bytes
		if bytesOf[t.Type] > bytesOf[most] {
			most = t.Type
		}
	}
	m.Quantisation = strings.ToUpper(most.String())
	return m, nil
}

// read reads the manifest of the model in dir and checks that it fits the directory.
func read(dir string) (Model, error) {
	path := filepath.Join(dir, ManifestFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return Model{}, err
	}
	m := Model{Dir: dir}
	if err := json.Unmarshal(data, &m.Manifest); err != nil {
		return Model{}, fmt.Errorf("%s: %w", path, err)
	}
	if name := filepath.Base(dir); m.Name != name {
		return Model{}, fmt.Errorf("%s: the name is %q, expected the directory's, %q", path, m.Name, name)
	}
	info, err := os.Stat(m.Weights())
	if err != nil {
		// Hidden, since a missing file must not look like a missing model.
		return Model{}, fmt.Errorf("the weights of model %q: %s", m.Name, err.Error())
	}
	if info.Size() != m.Bytes {
		return Model{}, fmt.Errorf("%s has %d bytes, its manifest says %d: remove the model and add it again",
			m.Weights(), info.Size(), m.Bytes)
	}
	return m, nil
}

// notFound turns a missing directory or manifest into ErrNotFound.
func notFound(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	return fmt.Errorf("model %q: %w", name, err)
}

// byName is the order of lists.
func byName(a, b Model) int { return cmp.Compare(strings.ToLower(a.Name), strings.ToLower(b.Name)) }
