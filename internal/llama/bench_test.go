package llama

import (
	"fmt"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
)

// BenchmarkDecode measures what the runner's choices rest on: eight prompts in one batch, then single rows.
func BenchmarkDecode(b *testing.B) {
	m := loadModel(b, ModelOptions{})
	for _, attention := range []Attention{AttentionFlash, AttentionPlain} {
		for _, separate := range []bool{false, true} {
			for _, resident := range []int{0, 1024} {
				if separate && resident > 0 {
					continue
				}
				b.Run(fmt.Sprintf("attention=%d/separate=%v/resident=%d", attention, separate, resident), func(b *testing.B) {
					ctx, err := NewContext(m, ContextOptions{Tokens: 9 * 1024, Sequences: 9, Threads: 1, Attention: attention, SeparateCaches: separate})
					if err != nil {
						b.Fatal(err)
					}
					defer ctx.Close()
					batch := NewBatch(2048)
					defer batch.Close()
					decode := func() {
						if err := ctx.Decode(batch); err != nil {
							b.Fatal(err)
						}
						batch.Reset()
					}
					for p := range resident {
						batch.Add(engine.Token(p%1000+100), p, 8, false)
						if batch.Len() == 512 {
							decode()
						}
					}
					var prefill, single, eight time.Duration
					for b.Loop() {
						for s := range 8 {
							ctx.RemoveSequence(s, 0)
							for p := range 220 {
								batch.Add(engine.Token((p*7+s*13)%1000+100), p, s, p == 219)
							}
						}
						start := time.Now()
						decode()
						prefill += time.Since(start)
						start = time.Now()
						for p := range 32 {
							batch.Add(200, 220+p, 0, true)
							decode()
						}
						single += time.Since(start)
						start = time.Now()
						for p := range 16 {
							for s := range 7 {
								batch.Add(200, 220+p, s+1, true)
							}
							decode()
						}
						eight += time.Since(start)
					}
					n := float64(b.N)
					b.ReportMetric(8*220*n/prefill.Seconds(), "prefill-tokens/s")
					b.ReportMetric(32*n/single.Seconds(), "decode1-tokens/s")
					b.ReportMetric(16*7*n/eight.Seconds(), "decode7-tokens/s")
				})
			}
		}
	}
}
