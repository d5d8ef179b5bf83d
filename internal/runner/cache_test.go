package runner

import (
	"testing"

	"github.com/hone-llm/hone/internal/child"
)

// The own engine's cache of keys and values takes little more than half of the memory in q8_0, and says the same where
// one continuation is far likelier than all others.
func TestCacheOfEightBits(t *testing.T) {
	const cacheTokens = 4096
	open := func(cache string) *Runner {
		r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 512, CacheTokens: cacheTokens, Sequences: 4, Threads: 1, Engine: engineOwn, CacheType: cache})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Close)
		return r
	}
	half, eight := open("f16"), open("q8_0")
	// 30 layers of a key and a value of 3 heads of 64 elements: 2 bytes each, or 34 bytes for 32.
	const elements = 30 * 2 * 3 * 64
	saved, want := half.memory-eight.memory, int64(cacheTokens*elements*(64-34)/32)
	t.Logf("%.1f MB with f16, %.1f MB with q8_0", float64(half.memory)/1e6, float64(eight.memory)/1e6)
	if saved < want*9/10 || saved > want*12/10 { // pages are whole
		t.Errorf("q8_0 saves %d bytes, expected about %d", saved, want)
	}
	for i := range series {
		req := child.GenerateRequest{Prompt: &series[i], MaxTokens: 3}
		if a, b := ask(t, half, req), ask(t, eight, req); a.Text != b.Text {
			t.Errorf("%q goes on with %q, and with q8_0 with %q", series[i], a.Text, b.Text)
		}
	}
}
