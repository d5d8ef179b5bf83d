package graph_test

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/modeltest"
)

// BenchmarkServerBusy measures prompts and single tokens with and without another process that keeps a core busy, in turns.
func BenchmarkServerBusy(b *testing.B) {
	for _, threads := range []int{1, 2} {
		s := newServer(b, modeltest.Path(b), graph.ServerOptions{Threads: threads, Sequences: 2, CacheTokens: 4096})
		for _, c := range []struct {
			name   string
			tokens int
		}{{"prefill-425", 425}, {"decode", 1}} {
			b.Run(c.name+"-threads-"+string(rune('0'+threads)), func(b *testing.B) {
				measure := func() float64 {
					n := 0
					start := time.Now()
					for time.Since(start) < 700*time.Millisecond {
						s.Truncate(0, 0)
						if err := s.Decode([]engine.Part{{Tokens: randomTokens(1, 40000, c.tokens), Want: engine.WantLast}}); err != nil {
							b.Fatal(err)
						}
						n++
					}
					return float64(n*c.tokens) / time.Since(start).Seconds()
				}
				measure()
				var idle, busy float64
				for b.Loop() {
					idle += measure()
					spinner := exec.Command("taskset", "-c", "0", os.Args[0], "-test.run=^TestSpinner$")
					spinner.Env = append(os.Environ(), "HONE_TEST_SPIN=1")
					if err := spinner.Start(); err != nil {
						b.Fatal(err)
					}
					time.Sleep(100 * time.Millisecond)
					busy += measure()
					_ = spinner.Process.Kill()
					_ = spinner.Wait()
				}
				b.ReportMetric(idle/float64(b.N), "tokens/s")
				b.ReportMetric(busy/idle, "busy-ratio")
			})
		}
	}
}

// TestSpinner is the busy process of BenchmarkServerBusy.
func TestSpinner(*testing.T) {
	for os.Getenv("HONE_TEST_SPIN") != "" {
	}
}
