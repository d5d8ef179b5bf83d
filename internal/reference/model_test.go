package reference_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/engine/enginetest"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/reference"
)

func TestLoadNamesWhatItDoesNotCompute(t *testing.T) {
	t.Parallel()
	plain := enginetest.Model{Name: "plain", Architecture: "llama", HeadSize: 16}.Write(t)
	architecture := enginetest.Model{Name: "architecture", Architecture: "gemma", HeadSize: 16}.Write(t)
	for _, c := range []struct {
		path   string
		change func(f *gguf.File)
		want   string
	}{
		{filepath.Join("..", "train", "testdata", "tiny-llama3.gguf"), nil, "type q4_K"},
		{architecture, nil, `"gemma"`},
		{plain, func(f *gguf.File) { delete(f.Metadata, "llama.block_count") }, "block_count"},
		{plain, func(f *gguf.File) { f.Metadata["llama.attention.head_count_kv"] = f.Metadata["llama.embedding_length"] }, "64 key-value heads"},
		{plain, func(f *gguf.File) { f.Metadata["llama.feed_forward_length"] = f.Metadata["llama.embedding_length"] }, "ffn_gate"},
		{plain, func(f *gguf.File) { f.Metadata["llama.rope.scaling.type"] = f.Metadata["general.architecture"] }, "rope.scaling.type"},
		{plain, func(f *gguf.File) { f.Metadata["llama.expert_count"] = f.Metadata["llama.block_count"] }, "expert_count"},
	} {
		f, err := gguf.Open(c.path)
		if err != nil {
			t.Fatal(err)
		}
		if c.change != nil {
			c.change(f)
		}
		if _, err := reference.Load(f); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, expected an error with %q", err, c.want)
		}
		f.Close()
	}
}
