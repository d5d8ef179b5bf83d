package graph_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/modeltest"
)

// BenchmarkServer takes this engine and llama.cpp in turns on the default model, since the machine's speed changes, and
// reports the medians: decoding with 1, 8 and 16 sequences of 100 tokens, a prompt of 85 tokens after a shared one of 134, and
// prompts of 512.
func BenchmarkServer(b *testing.B) {
	path := modeltest.Path(b)
	llama.Open(llama.Options{})
	m, err := llama.LoadModel(path, llama.ModelOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	other, err := llama.NewDecoder(m, llama.ContextOptions{Sequences: 17, Tokens: 4096, BatchTokens: 512, Threads: 2})
	if err != nil {
		b.Fatal(err)
	}
	defer other.Close()
	own := newServer(b, path, graph.ServerOptions{Threads: 2, Sequences: 17, CacheTokens: 4096})
	engines := []engine.Decoder{own, other}
	names := []string{"own", "llama"}
	run := func(d engine.Decoder, parts ...engine.Part) {
		if err := d.Decode(parts); err != nil {
			b.Fatal(err)
		}
	}
	type measure struct {
		name   string
		tokens int
		setUp  func(d engine.Decoder)
		run    func(d engine.Decoder)
	}
	var cases []measure
	for _, n := range []int{1, 8, 16} {
		const steps = 8
		position := map[engine.Decoder]int{}
		cases = append(cases, measure{fmt.Sprintf("decode-%d", n), n * steps, func(d engine.Decoder) {
			for i := range n {
				d.Truncate(engine.Sequence(i), 0)
				run(d, engine.Part{Sequence: engine.Sequence(i), Tokens: randomTokens(uint64(i), 40000, 100)})
			}
			position[d] = 100
		}, func(d engine.Decoder) {
			for range steps {
				var parts []engine.Part
				for i := range n {
					parts = append(parts, engine.Part{Sequence: engine.Sequence(i), Position: position[d], Tokens: []engine.Token{7}, Want: engine.WantLast})
				}
				run(d, parts...)
				position[d]++
			}
		}})
	}
	cases = append(cases, measure{"prefill-85-after-134", 85, func(d engine.Decoder) {
		d.Truncate(16, 0)
		run(d, engine.Part{Sequence: 16, Tokens: randomTokens(50, 40000, 134)})
	}, func(d engine.Decoder) {
		d.Truncate(0, 0)
		d.Share(16, 0, 134)
		run(d, engine.Part{Position: 134, Tokens: randomTokens(51, 40000, 85), Want: engine.WantLast})
	}}, measure{"prefill-512", 512, func(d engine.Decoder) {}, func(d engine.Decoder) {
		d.Truncate(0, 0)
		run(d, engine.Part{Tokens: randomTokens(52, 40000, 512), Want: engine.WantLast})
	}}, measure{"prefill-5x85-after-134", 5 * 85, func(d engine.Decoder) {
		d.Truncate(16, 0)
		run(d, engine.Part{Sequence: 16, Tokens: randomTokens(50, 40000, 134)})
	}, func(d engine.Decoder) {
		var parts []engine.Part
		for i := range engine.Sequence(5) {
			d.Truncate(i, 0)
			d.Share(16, i, 134)
			parts = append(parts, engine.Part{Sequence: i, Position: 134, Tokens: randomTokens(51, 40000, 85), Want: engine.WantLast})
		}
		run(d, parts...)
	}})
	for _, c := range cases {
		b.Run(c.name, func(b *testing.B) {
			times := make([][]float64, len(engines))
			for _, d := range engines {
				for i := range engine.Sequence(17) {
					d.Truncate(i, 0)
				}
				c.setUp(d)
				c.run(d)
			}
			for b.Loop() {
				for i, d := range engines {
					start := time.Now()
					c.run(d)
					times[i] = append(times[i], time.Since(start).Seconds())
				}
			}
			var rates []float64
			for i := range engines {
				slices.Sort(times[i])
				rates = append(rates, float64(c.tokens)/times[i][len(times[i])/2])
				b.ReportMetric(rates[i], names[i]+"-tokens/s")
			}
			b.ReportMetric(rates[0]/rates[1], "ratio")
		})
	}
}

// BenchmarkServerProfile logs what the operations of a batch take on one thread and on two, the fastest of many runs: the
// whole of Decode beside them, and so what is spent outside of them.
func BenchmarkServerProfile(b *testing.B) {
	for _, threads := range []int{1, 2} {
		s := newServer(b, modeltest.Path(b), graph.ServerOptions{Threads: threads, Sequences: 17, CacheTokens: 8192})
		for _, c := range []struct {
			name          string
			parts, tokens int
		}{{"decode-1", 1, 1}, {"decode-8", 8, 1}, {"decode-16", 16, 1}, {"prefill-85", 1, 85}, {"prefill-5x85", 5, 85}, {"prefill-512", 1, 512}} {
			b.Run(fmt.Sprintf("%s-threads-%d", c.name, threads), func(b *testing.B) {
				var parts []engine.Part
				for i := range c.parts {
					p := engine.Part{Sequence: engine.Sequence(i), Position: 134, Tokens: randomTokens(uint64(i), 40000, c.tokens), Want: engine.WantLast}
					s.Truncate(p.Sequence, 0)
					if err := s.Decode([]engine.Part{{Sequence: p.Sequence, Tokens: randomTokens(1, 40000, 134)}}); err != nil {
						b.Fatal(err)
					}
					parts = append(parts, p)
				}
				best := map[string]ggml.Cost{}
				whole := time.Hour
				rewind := func() {
					for _, p := range parts {
						s.Truncate(p.Sequence, p.Position)
					}
				}
				for b.Loop() {
					rewind()
					costs, err := s.Profile(parts)
					if err != nil {
						b.Fatal(err)
					}
					for kind, cost := range costs {
						if old, ok := best[kind]; !ok || cost.Time < old.Time {
							best[kind] = cost
						}
					}
					rewind()
					start := time.Now()
					if err := s.Decode(parts); err != nil {
						b.Fatal(err)
					}
					whole = min(whole, time.Since(start))
				}
				var sum time.Duration
				nodes := 0
				text := "\n"
				for _, kind := range slices.Sorted(maps.Keys(best)) {
					sum += best[kind].Time
					nodes += best[kind].Nodes
					text += fmt.Sprintf("  %s %d x %.3f", kind, best[kind].Nodes, best[kind].Time.Seconds()*1e3/float64(best[kind].Nodes))
				}
				b.Logf("%d nodes, %.3f ms, whole %.3f ms%s", nodes, sum.Seconds()*1e3, whole.Seconds()*1e3, text)
				b.ReportMetric(float64(c.parts*c.tokens)/whole.Seconds(), "tokens/s")
			})
		}
	}
}

// BenchmarkServerAdapters reports what 16 tokens of 16 sequences over 8 adapters take, as a part of what they take with the base
// alone; and the same of 16 prompts of 30 tokens.
func BenchmarkServerAdapters(b *testing.B) {
	path := modeltest.Path(b)
	m := load(b, path, graph.ExactLayout())
	for _, c := range []struct {
		name    string
		modules []graph.Module
		tokens  int
	}{{"decode-all", graph.AllLinear, 1}, {"decode-qv", []graph.Module{graph.Query, graph.Value}, 1}, {"prefill-all", graph.AllLinear, 30}} {
		b.Run(c.name, func(b *testing.B) {
			s := newServer(b, path, graph.ServerOptions{Threads: 1, Sequences: 16, CacheTokens: 4096})
			var base, adapted []engine.Part
			var adapters []engine.Adapter
			for i := range 8 {
				_, file := writeAdapter(b, m, openFile(b, path), uint64(i), 0.01, graph.LoRAOptions{Rank: 8, Alpha: 16, Modules: c.modules})
				a, err := s.LoadAdapter(file)
				if err != nil {
					b.Fatal(err)
				}
				defer a.Close()
				adapters = append(adapters, a)
			}
			for i := range engine.Sequence(16) {
				p := engine.Part{Sequence: i, Position: 100, Tokens: randomTokens(uint64(i), 40000, c.tokens), Want: engine.WantLast}
				if err := s.Decode([]engine.Part{{Sequence: i, Tokens: randomTokens(1, 40000, 100)}}); err != nil {
					b.Fatal(err)
				}
				base = append(base, p)
				p.Adapter = adapters[i%8]
				adapted = append(adapted, p)
			}
			var best [2]time.Duration
			for b.Loop() {
				for i, parts := range [][]engine.Part{base, adapted} {
					for _, p := range parts {
						s.Truncate(p.Sequence, p.Position)
					}
					costs, err := s.Profile(parts) // of one thread: processor time
					if err != nil {
						b.Fatal(err)
					}
					var sum time.Duration
					for _, cost := range costs {
						sum += cost.Time
					}
					if best[i] == 0 || sum < best[i] {
						best[i] = sum
					}
				}
			}
			b.ReportMetric(best[1].Seconds()/best[0].Seconds(), "adapted/base")
		})
	}
}

// BenchmarkServerLoad is the time to load the default model and to compute a first token.
func BenchmarkServerLoad(b *testing.B) {
	path := modeltest.Path(b)
	bytes, err := graph.ServerBytes(openFile(b, path), graph.ServerOptions{})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s := newServer(b, path, graph.ServerOptions{})
		if err := s.Decode([]engine.Part{{Tokens: []engine.Token{1}, Want: engine.WantLast}}); err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
	b.Logf("%+v", bytes)
}
