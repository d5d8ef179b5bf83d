// Package lora holds the files of a LoRA adapter: the manifest, the GGUF file that llama.cpp serves and the copy in
// PEFT's format. The trainer writes them, the registry of package adapters reads them.
//
//	err := lora.Export(dir, lora.Weights{...}) // the manifest comes last
//	manifest, err := lora.ReadManifest(dir)
package lora

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Names of the files of an adapter directory. Manifest.Files lists all of them but the manifest itself.
const (
	ManifestFile = "manifest.json"
	GGUFFile     = "adapter.gguf"
	PEFTWeights  = "adapter_model.safetensors"
	PEFTConfig   = "adapter_config.json"
)

// Manifest says what an adapter is, what it belongs to and how it was trained. It is manifest.json, the last file
// written into an adapter's directory: a directory without one is not an adapter.
type Manifest struct {
	ID         string `json:"id"`   // the directory's name, and the last part of Name
	Name       string `json:"name"` // ft:<base>:local:<suffix>:<id>, the model name on the wire
	BaseModel  string `json:"base_model"`
	BaseDigest string `json:"base_digest"` // sha256 of the base model's base.gguf, hex
	JobID      string `json:"job_id"`
	CreatedAt  int64  `json:"created_at"` // Unix seconds

	Rank          int      `json:"rank"`
	Alpha         float64  `json:"alpha"`          // the weights are scaled by Alpha/Rank when applied
	TargetModules []string `json:"target_modules"` // q_proj, k_proj, ...

	ChatTemplateDigest string   `json:"chat_template_digest,omitempty"` // sha256 of the template's text, hex
	QuestionTemplate   string   `json:"question_template,omitempty"`    // how `hone predict` writes a question
	SystemMessage      string   `json:"system_message,omitempty"`       // of the training rows, if they all have the same
	Choices            []string `json:"choices,omitempty"`              // answers of the training rows, if they are few
	MaxLength          int      `json:"max_length"`                     // longest training row, tokens

	Files map[string]string `json:"files"` // file name: sha256, hex
}

// ReadManifest reads and checks the manifest of the adapter directory dir. It does not read the files it lists;
// that they exist with the listed digests is for Registry.Publish to check.
func ReadManifest(dir string) (Manifest, error) {
	path := filepath.Join(dir, ManifestFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return Manifest{}, fmt.Errorf("adapter manifest: %w", err)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return Manifest{}, fmt.Errorf("adapter manifest %s: %w", path, err)
	}
	if err := m.Validate(); err != nil {
		return Manifest{}, fmt.Errorf("adapter manifest %s: %w", path, err)
	}
	return m, nil
}

// Validate reports every field that makes the manifest unusable, joined in one error.
func (m *Manifest) Validate() error {
	var errs []error
	if !validID(m.ID) {
		errs = append(errs, fmt.Errorf("id %q: expected 1 to 64 of a-z, 0-9, - and _", m.ID))
	}
	if !strings.HasPrefix(m.Name, "ft:") {
		errs = append(errs, fmt.Errorf("name %q: expected ft:<base>:local:<suffix>:<id>", m.Name))
	}
	if m.BaseModel == "" {
		errs = append(errs, errors.New("base_model is empty"))
	}
	if !validDigest(m.BaseDigest) {
		errs = append(errs, fmt.Errorf("base_digest %q: expected 64 lower-case hexadecimal digits", m.BaseDigest))
	}
	if m.Rank <= 0 {
		errs = append(errs, fmt.Errorf("rank %d: expected at least 1", m.Rank))
	}
	if m.Files[GGUFFile] == "" {
		errs = append(errs, fmt.Errorf("files: %s is missing", GGUFFile))
	}
	for name, digest := range m.Files {
		if name == ManifestFile || name != filepath.Base(name) || name == "." || name == ".." {
			errs = append(errs, fmt.Errorf("files: %q is not a plain file name", name))
		}
		if !validDigest(digest) {
			errs = append(errs, fmt.Errorf("files: digest %q of %q: expected 64 lower-case hexadecimal digits", digest, name))
		}
	}
	return errors.Join(errs...)
}

// validID reports whether id may name a directory: 1 to 64 lower-case letters, digits, - and _.
func validID(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	return strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-_") == "" && id[0] != '-'
}

func validDigest(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}
