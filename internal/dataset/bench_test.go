package dataset_test

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/dataset"
)

// questions writes n rows like the multiple-choice questions of the examples, 120 to 130 tokens each.
func questions(t testing.TB, n int) string {
	t.Helper()
	words := strings.Fields("the city river answer which of following is capital large country between mountain history was first known " +
		"people language year energy water system during government common because found example small different number")
	path := filepath.Join(t.TempDir(), "questions.jsonl")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := bufio.NewWriter(f)
	random := rand.New(rand.NewPCG(1, 2))
	text := func(n int) string {
		picked := make([]string, n)
		for i := range picked {
			picked[i] = words[random.IntN(len(words))]
		}
		return strings.Join(picked, " ")
	}
	for i := range n {
		fmt.Fprintf(out, `{"messages": [{"role": "system", "content": "Answer the question with one letter."}, {"role": "user", "content": "%d. %s?\nA. %s\nB. %s\nC. %s\nD. %s"}, {"role": "assistant", "content": "%c"}]}`+"\n",
			i, text(50), text(9), text(9), text(9), text(9), 'A'+random.IntN(4))
	}
	if err := out.Flush(); err != nil {
		t.Fatal(err)
	}
	return path
}

// BenchmarkOpen tokenizes 20,000 questions, and finds them in the cache.
func BenchmarkOpen(b *testing.B) {
	const rows = 20000
	builder, path := loadModel(b).chat, questions(b, rows)
	for _, kind := range []string{"answers", "choices"} {
		o := dataset.Options{MaxLength: 2048}
		if kind == "choices" {
			o.Choices = []string{"A", "B", "C", "D"}
		}
		b.Run("tokenize/"+kind, func(b *testing.B) {
			tokens := 0
			for b.Loop() {
				d, err := dataset.Open(b.Context(), path, builder, o)
				if err != nil {
					b.Fatal(err)
				}
				tokens = d.Tokens
				d.Close()
			}
			b.ReportMetric(rows*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
			b.ReportMetric(float64(tokens)/rows, "tokens/row")
		})
	}
	o := dataset.Options{MaxLength: 2048, CacheDir: b.TempDir()}
	d, err := dataset.Open(b.Context(), path, builder, o)
	if err != nil {
		b.Fatal(err)
	}
	d.Close()
	b.Run("cached", func(b *testing.B) {
		for b.Loop() {
			d, err := dataset.Open(b.Context(), path, builder, o)
			if err != nil {
				b.Fatal(err)
			}
			d.Close()
		}
		b.ReportMetric(rows*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
	})
}

// BenchmarkPack reads and packs an epoch in batches of eight.
func BenchmarkPack(b *testing.B) {
	const rows = 4000
	d, err := dataset.Open(b.Context(), questions(b, rows), loadModel(b).chat, dataset.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	order := d.Order(1, 0)
	for _, share := range []bool{false, true} {
		b.Run(fmt.Sprintf("share=%v", share), func(b *testing.B) {
			computed := 0
			for b.Loop() {
				computed = 0
				for i := 0; i < rows; i += 8 {
					examples, err := d.Examples(order, i, i+8)
					if err != nil {
						b.Fatal(err)
					}
					for _, m := range dataset.Pack(examples, 1024, share) {
						computed += len(m.Batch.Tokens)
					}
				}
			}
			b.ReportMetric(rows*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
			b.ReportMetric(float64(computed)/rows, "computed/row")
		})
	}
}
