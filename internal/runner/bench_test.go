package runner

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/hone-llm/hone/internal/child"
)

// BenchmarkMultipleChoice answers questions of about 220 prompt tokens, eight at a time, as `hone predict` asks them:
// 60 tokens of instruction are the same for all, the rest is each one's own. HONE_BENCH_THREADS sets the threads,
// HONE_BENCH_ENGINE the engine.
func BenchmarkMultipleChoice(b *testing.B) {
	threads, err := strconv.Atoi(os.Getenv("HONE_BENCH_THREADS"))
	if err != nil {
		threads = 0
	}
	r, err := New(Options{ModelDir: modelDir(b), ContextTokens: 2048, Threads: threads, Engine: os.Getenv("HONE_BENCH_ENGINE")})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	random := rand.New(rand.NewPCG(1, 2))
	words := strings.Fields("river stone light under seven garden letter north winter copper morning island music paper cloud silver forest window")
	text := func(n int) string {
		picked := make([]string, n)
		for i := range picked {
			picked[i] = words[random.IntN(len(words))]
		}
		return strings.Join(picked, " ")
	}
	questions := make(chan string)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for q := range questions {
				req := child.GenerateRequest{Messages: chat(q), Constraint: choose("A", "B", "C", "D"), LogProbs: true, TopLogProbs: 4, TopP: 1}
				if err := r.Generate(b.Context(), req, func(child.GenerateEvent) error { return nil }); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for b.Loop() {
		questions <- "You answer multiple-choice questions. Read the question and the four options, then answer with the letter of the best option and nothing else.\n\n" +
			fmt.Sprintf("Question: %s?\nA. %s\nB. %s\nC. %s\nD. %s\nAnswer:", text(60), text(15), text(15), text(15), text(15))
	}
	close(questions)
	wg.Wait()
	status, err := r.Status(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "questions/s")
	b.ReportMetric(float64(status.PromptTokens)/float64(b.N), "prompt-tokens")
	b.ReportMetric(float64(status.ReusedTokens)/float64(b.N), "reused-tokens")
}

// BenchmarkStart loads the model and generates one token: a process start to its first token, without the process.
func BenchmarkStart(b *testing.B) {
	dir := modelDir(b)
	for b.Loop() {
		r, err := New(Options{ModelDir: dir, Engine: os.Getenv("HONE_BENCH_ENGINE")})
		if err != nil {
			b.Fatal(err)
		}
		if err := r.Generate(b.Context(), child.GenerateRequest{Messages: chat("Hello"), MaxTokens: 1, TopP: 1}, func(child.GenerateEvent) error { return nil }); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		r.Close()
		b.StartTimer()
	}
}

// BenchmarkStreams has eight streams of 64 tokens at a time, and says how much of the time was not the decoder's.
func BenchmarkStreams(b *testing.B) {
	r, err := New(Options{ModelDir: modelDir(b), ContextTokens: 512, Engine: os.Getenv("HONE_BENCH_ENGINE")})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	tokens := 0
	before, err := r.Status(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				req := child.GenerateRequest{Prompt: &open[i], MaxTokens: 64, IgnoreEOS: true, TopP: 1}
				if err := r.Generate(b.Context(), req, func(child.GenerateEvent) error { return nil }); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		tokens += 8 * 64
	}
	after, err := r.Status(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(tokens)/b.Elapsed().Seconds(), "tokens/s")
	b.ReportMetric(100*(1-(after.ComputeSeconds-before.ComputeSeconds)/b.Elapsed().Seconds()), "%outside")
}
