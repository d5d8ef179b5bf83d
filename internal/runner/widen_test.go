package runner

import (
	"encoding/binary"
	"math"
	"os"
	"testing"

	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/modeltest"
)

// TestWidened compares the bfloat16 copy with the file: the same model, every matrix rounded to 8 bits.
func TestWidened(t *testing.T) {
	f, err := gguf.Open(modeltest.Path(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	path, err := widened(f)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(path)
	wide, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer wide.Close()
	if err := gguf.CheckModel(wide); err != nil {
		t.Fatal(err)
	}
	if len(wide.Keys) != len(f.Keys) || len(wide.Tensors) != len(f.Tensors) {
		t.Fatalf("%d keys and %d tensors, want %d and %d", len(wide.Keys), len(wide.Tensors), len(f.Keys), len(f.Tensors))
	}
	for _, name := range []string{"token_embd.weight", "blk.7.ffn_down.weight", "blk.0.attn_norm.weight"} {
		before, _ := f.Tensor(name)
		after, _ := wide.Tensor(name)
		want := make([]float32, before.Elements())
		ggml.Dequantize(want, ggml.Type(before.Type), f.Data(before))
		data := wide.Data(after)
		for i, v := range want {
			got := v
			if len(before.Shape) == 2 {
				got = math.Float32frombits(uint32(binary.LittleEndian.Uint16(data[2*i:])) << 16)
			} else if after.Type != gguf.F32 {
				t.Fatalf("%s is %s", name, after.Type)
			}
			if diff := math.Abs(float64(got - v)); diff > math.Abs(float64(v))/256 {
				t.Fatalf("%s[%d] is %v, want %v", name, i, got, v)
			}
		}
	}
}
