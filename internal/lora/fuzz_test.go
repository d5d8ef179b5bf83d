package lora

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hone-llm/hone/internal/gguf"
)

// Whatever lies in an adapter's directory, reading it ends with an error or with weights that fit the base model. An empty
// file is left out.
func FuzzRead(f *testing.F) {
	base := tinyBase(f, "llama")
	ours := filepath.Join(f.TempDir(), "ours")
	if err := Export(ours, goldenWeights(f)); err != nil {
		f.Fatal(err)
	}
	read := func(dir, name string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	manifest, config, weights, engine := read(ours, ManifestFile), read(ours, PEFTConfig), read(ours, PEFTWeights), read(ours, GGUFFile)
	f.Add(manifest, config, weights, engine)
	f.Add([]byte{}, config, weights, []byte{})
	f.Add([]byte{}, []byte{}, []byte{}, engine)
	f.Add([]byte{}, read("testdata/peft", PEFTConfig), weights[:len(weights)/2], []byte{})
	f.Add([]byte{}, []byte{}, []byte{}, engine[:len(engine)-1])
	f.Add([]byte(`{"files":{"../x":""}}`), config, weights, engine)
	f.Add([]byte{}, []byte(`{"peft_type":"LORA","r":-1,"lora_alpha":1e999,"rank_pattern":{"a":1}}`), weights, engine)
	f.Fuzz(func(t *testing.T, manifest, config, weights, engine []byte) {
		dir := t.TempDir()
		for name, data := range map[string][]byte{ManifestFile: manifest, PEFTConfig: config, PEFTWeights: weights, GGUFFile: engine} {
			if len(data) == 0 {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if m, err := ReadManifest(dir); err == nil && (m.ID == "" || filepath.Base(m.ID) != m.ID) {
			t.Errorf("the manifest has the id %q", m.ID)
		}
		if file, err := gguf.Open(filepath.Join(dir, GGUFFile)); err == nil {
			if gguf.CheckAdapter(file, base) == nil && len(file.Tensors) == 0 {
				t.Error("an adapter without tensors is right")
			}
			file.Close()
		}
		w, err := Read(dir, base)
		if err != nil {
			return
		}
		if len(w.Modules) == 0 || w.Manifest.Rank <= 0 {
			t.Errorf("read as %+v", w.Manifest)
		}
		for _, m := range w.Modules {
			if len(m.A) != w.Manifest.Rank*m.In || len(m.B) != w.Manifest.Rank*m.Out {
				t.Errorf("layer %d %s has %d and %d elements, expected rank %d", m.Layer, m.Name, len(m.A), len(m.B), w.Manifest.Rank)
			}
		}
	})
}
