package runner

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/wire"
	"go.uber.org/goleak"
)

// runAsChild in the environment makes the test binary a runner: see TestChildProcess.
const runAsChild = "HONE_TEST_RUNNER"

func TestMain(m *testing.M) {
	if os.Getenv(runAsChild) != "" {
		os.Exit(childMain())
	}
	code := m.Run()
	if shared.runner != nil {
		shared.runner.Close()
	}
	if code == 0 {
		// The thread that starts children lives as long as the process.
		if err := goleak.Find(goleak.IgnoreTopFunction("github.com/hone-llm/hone/internal/child.forkThread")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// modelDir makes a model directory of the default model.
func modelDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Symlink(modeltest.Path(t), filepath.Join(dir, "base.gguf")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// shared is one runner for the tests that only ask it questions. One thread, as the tests of other packages run beside.
var shared struct {
	once   sync.Once
	runner *Runner
	err    error
}

func sharedRunner(t *testing.T) *Runner {
	t.Helper()
	shared.once.Do(func() {
		shared.runner, shared.err = New(Options{ModelDir: modelDir(t), ContextTokens: 1024, Sequences: 8, Threads: 1})
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.runner
}

// answer is a whole completion.
type answer struct {
	Text     string
	LogProbs []child.TokenLogProb
	Finish   string
	Usage    child.Usage
	Events   int
}

func generate(ctx context.Context, r *Runner, req child.GenerateRequest) (answer, error) {
	var a answer
	if req.TopP == 0 {
		req.TopP = 1
	}
	err := r.Generate(ctx, req, func(e child.GenerateEvent) error {
		a.Text += e.Text
		a.LogProbs = append(a.LogProbs, e.LogProbs...)
		a.Events++
		if e.FinishReason != "" {
			a.Finish = e.FinishReason
		}
		if e.Usage != nil {
			a.Usage = *e.Usage
		}
		return nil
	})
	return a, err
}

func ask(t *testing.T, r *Runner, req child.GenerateRequest) answer {
	t.Helper()
	a, err := generate(t.Context(), r, req)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func chat(text string) []wire.Message {
	return []wire.Message{{Role: "user", Content: text}}
}

const question = "What is the capital of France?"

// series have one likely continuation each, far above the others. Two computations of the same logits differ by up to
// 0.5 here: how a sequence's cells lie in the cache changes the order of sums, and rounding activations to 8 bits
// amplifies that. Where the model hesitates between two tokens, answers can therefore differ from run to run.
var series = []string{
	"Monday, Tuesday, Wednesday, Thursday, Friday,",
	"1, 2, 3, 4, 5, 6, 7,",
	"A B C D E F G",
	"January, February, March, April, May,",
	"red red red red red red red red",
	"10 20 30 40 50 60",
}

func continuation(text string) child.GenerateRequest {
	return child.GenerateRequest{Prompt: &text, MaxTokens: 6}
}

func TestConcurrentEqualsAlone(t *testing.T) {
	r := sharedRunner(t)
	want := make([]answer, len(series))
	for i, text := range series {
		want[i] = ask(t, r, continuation(text))
		if want[i].Text == "" || want[i].Events < 3 {
			t.Fatalf("%q: answer %+v is not a stream of text", text, want[i])
		}
	}
	if !strings.Contains(want[0].Text, "Saturday") {
		t.Errorf("%q continues with %q", series[0], want[0].Text)
	}
	for range 3 {
		got := make([]answer, len(series))
		errs := make([]error, len(series))
		var wg sync.WaitGroup
		for i, text := range series {
			wg.Go(func() { got[i], errs[i] = generate(t.Context(), r, continuation(text)) })
		}
		wg.Wait()
		for i := range series {
			if errs[i] != nil {
				t.Fatal(errs[i])
			}
			if got[i].Text != want[i].Text || got[i].Finish != want[i].Finish {
				t.Errorf("%q: together %q (%s), alone %q (%s)", series[i], got[i].Text, got[i].Finish, want[i].Text, want[i].Finish)
			}
			if got[i].Usage.CachedTokens != got[i].Usage.PromptTokens-1 {
				t.Errorf("%q: asked again, the prompt was not in the cache: %+v", series[i], got[i].Usage)
			}
		}
	}
}

// Prompts that share their beginning compute it once, also when they come at the same time.
func TestSharedPrefix(t *testing.T) {
	r := sharedRunner(t)
	shared := strings.Repeat("This instruction is the same for everybody. ", 12)
	before, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			text := shared + fmt.Sprint("Number ", i, " asks:")
			if a, err := generate(t.Context(), r, child.GenerateRequest{Prompt: &text, MaxTokens: 1}); err != nil || a.Usage.CompletionTokens != 1 {
				t.Errorf("%+v, %v", a, err)
			}
		})
	}
	wg.Wait()
	after, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	prompts, reused := after.PromptTokens-before.PromptTokens, after.ReusedTokens-before.ReusedTokens
	// Seven of the eight find all but the last five tokens or so.
	if float64(reused) < 0.8*float64(prompts) {
		t.Errorf("of %d prompt tokens %d were reused, want at least 80%%", prompts, reused)
	}
}

func TestStopStrings(t *testing.T) {
	r := sharedRunner(t)
	req := continuation(series[0])
	whole := ask(t, r, req)
	if len(whole.Text) < 12 {
		t.Fatalf("the answer %q is too short for this test", whole.Text)
	}
	// Pieces of the answer, which begin and end inside of tokens and go across them.
	for _, stop := range []string{whole.Text[:1], whole.Text[1:3], whole.Text[3:9], whole.Text[5:12], whole.Text[len(whole.Text)-2:]} {
		want, _, _ := strings.Cut(whole.Text, stop)
		req.Stop, req.LogProbs = []string{"never said", stop}, true
		got := ask(t, r, req)
		if got.Text != want || got.Finish != "stop" {
			t.Errorf("stop at %q: got %q (%s), want %q (stop)", stop, got.Text, got.Finish, want)
		}
		var pieces strings.Builder
		for _, p := range got.LogProbs {
			pieces.WriteString(p.Token)
		}
		if !strings.HasPrefix(pieces.String(), want) {
			t.Errorf("stop at %q: the tokens %q do not cover the text %q", stop, pieces.String(), want)
		}
	}
}

func TestMaxTokensAndUsage(t *testing.T) {
	r := sharedRunner(t)
	a := ask(t, r, child.GenerateRequest{Messages: chat("Count from one to fifty."), MaxTokens: 5})
	if a.Finish != "length" || a.Usage.CompletionTokens != 5 || a.Usage.PromptTokens < 10 {
		t.Errorf("got %+v, want 5 tokens and finish reason length", a)
	}
	text := "The quick brown fox"
	a = ask(t, r, child.GenerateRequest{Prompt: &text, MaxTokens: 4})
	if a.Text == "" || a.Usage.PromptTokens != 4 {
		t.Errorf("plain completion: %+v", a)
	}
	empty := ""
	if a = ask(t, r, child.GenerateRequest{Prompt: &empty, MaxTokens: 2}); a.Usage.PromptTokens != 1 {
		t.Errorf("plain completion of nothing: %+v", a)
	}
}

func TestSeed(t *testing.T) {
	r := sharedRunner(t)
	req := child.GenerateRequest{Messages: chat("Write one sentence about the sea."), MaxTokens: 16, Temperature: 1.2, TopP: 0.95, Seed: new(int64)}
	first := ask(t, r, req)
	if again := ask(t, r, req); again.Text != first.Text {
		t.Errorf("the same seed gave %q and %q", first.Text, again.Text)
	}
	other := int64(7)
	req.Seed = &other
	if again := ask(t, r, req); again.Text == first.Text {
		t.Errorf("two seeds gave the same text %q", first.Text)
	}
}

func TestLogProbs(t *testing.T) {
	r := sharedRunner(t)
	a := ask(t, r, child.GenerateRequest{Messages: chat(question), MaxTokens: 6, LogProbs: true, TopLogProbs: 20})
	var text strings.Builder
	for i, p := range a.LogProbs {
		text.WriteString(p.Token)
		if len(p.Top) != 20 {
			t.Fatalf("token %d has %d alternatives, want 20", i, len(p.Top))
		}
		if p.Top[0].Token != p.Token || p.Top[0].LogProb != p.LogProb || p.LogProb > 0 {
			t.Errorf("token %d: greedy took %q (%v), the most likely is %q (%v)", i, p.Token, p.LogProb, p.Top[0].Token, p.Top[0].LogProb)
		}
		if !slices.IsSortedFunc(p.Top, func(a, b child.TokenLogProb) int { return -cmpFloat(a.LogProb, b.LogProb) }) {
			t.Errorf("token %d: alternatives are not in descending order", i)
		}
		sum := 0.0
		for _, top := range p.Top {
			sum += math.Exp(top.LogProb)
		}
		if sum > 1+1e-6 {
			t.Errorf("token %d: the probabilities sum to %v", i, sum)
		}
	}
	if text.String() != a.Text {
		t.Errorf("the tokens spell %q, the text is %q", text.String(), a.Text)
	}
	// Temperature changes what is drawn, not what is reported.
	hot := ask(t, r, child.GenerateRequest{Messages: chat(question), MaxTokens: 1, LogProbs: true, TopLogProbs: 1, Temperature: 1.5, Seed: new(int64)})
	if got, want := hot.LogProbs[0].Top[0].LogProb, a.LogProbs[0].Top[0].LogProb; math.Abs(got-want) > 1e-2 {
		t.Errorf("log-probability %v at temperature 1.5, %v at 0", got, want)
	}
}

func cmpFloat(a, b float64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Every choice can be the answer. Greedy, each token is the likeliest of those that can still lead to a choice, which
// for choices of several tokens is not always the likeliest choice.
func TestChoices(t *testing.T) {
	r := sharedRunner(t)
	for _, choices := range [][]string{
		{"A", "B", "C", "D"},
		{"yes", "no"},
		{"Paris", "Paris is lovely", "London"},
		{"北京", "上海", "\"quoted\"\n"},
	} {
		for _, temperature := range []float64{0, 2} {
			a := ask(t, r, child.GenerateRequest{
				Messages:   chat("Question: Which city is the capital of France?\nA. London\nB. Rome\nC. Paris\nD. Berlin\nAnswer:"),
				Constraint: choose(choices...), LogProbs: true, TopLogProbs: 20, Temperature: temperature, Seed: new(int64),
			})
			if !slices.Contains(choices, a.Text) || a.Finish != "stop" {
				t.Errorf("got %q (%s), want one of %q", a.Text, a.Finish, choices)
			}
			for i, p := range a.LogProbs {
				sum := 0.0
				for _, top := range p.Top {
					sum += math.Exp(top.LogProb)
				}
				if temperature == 0 && p.LogProb != p.Top[0].LogProb {
					t.Errorf("%q: greedy took %q (%v) as token %d, the most likely is %q (%v)", choices, p.Token, p.LogProb, i, p.Top[0].Token, p.Top[0].LogProb)
				}
				if math.Abs(sum-1) > 1e-6 {
					t.Errorf("%q: probabilities of token %d sum to %v, want 1: %+v", choices, i, sum, p.Top)
				}
			}
		}
	}
	// Words of one token compete as a whole: the token "L" alone is likelier than "Paris", and would lead to London.
	a := ask(t, r, child.GenerateRequest{Messages: chat("What is the capital of France?"), Constraint: choose("London", "Paris"), LogProbs: true, TopLogProbs: 20})
	if a.Text != "Paris" || len(a.LogProbs) != 1 || len(a.LogProbs[0].Top) != 2 {
		t.Errorf("London or Paris: got %q with %+v, want Paris in one token of two", a.Text, a.LogProbs)
	}
	a = ask(t, r, child.GenerateRequest{Messages: chat("x"), Constraint: choose("A", "B", "C", "D"), LogProbs: true, TopLogProbs: 20})
	if len(a.LogProbs) != 1 || len(a.LogProbs[0].Top) != 4 || a.Usage.CompletionTokens != 1 {
		t.Errorf("one of four letters took %+v, want one token with four alternatives", a)
	}
}

// The letters of a multiple-choice question: a constrained answer is the letter that the model itself prefers, with the
// model's own probabilities, renormalised.
func TestChoiceIsTheMostLikelyLetter(t *testing.T) {
	// A runner of its own and every question asked before, so that both completions compute the same last row over cells
	// in the same order. Then the logits are equal to the bit (see series for what happens otherwise), and what is left
	// is the rounding of two ways to normalise in float64: measured 1.1e-16.
	const tolerance = 1e-12
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 1024, Sequences: 1, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	letters := []string{"A", "B", "C", "D"}
	answers := map[string]int{}
	for _, c := range []struct {
		question string
		present  int // of the letters, how many are among the 20 most likely tokens at least
	}{
		{"Question: Which city is the capital of France?\nA. London\nB. Rome\nC. Paris\nD. Berlin\nAnswer:", 4},
		{"Question: Which planet is the largest?\nA. Mars\nB. Venus\nC. Earth\nD. Jupiter\nAnswer:", 4},
		{"Question: How many legs does a spider have?\nA. four\nB. six\nC. eight\nD. ten\nAnswer:", 4},
		{"Question: What colour is the sky on a clear day?\nA. green\nB. red\nC. yellow\nD. blue\nReply with one letter: A, B, C or D.", 4},
		{"Which is a fruit?\nA. hammer\nB. apple\nC. copper\nD. violin\nAnswer with the letter only.", 4},
		{"下列哪一项是水果？\nA. 锤子\nB. 苹果\nC. 铜\nD. 小提琴\n答案：", 4},
		{"Say the letter B.", 2},
		{"Say the letter D.", 2},
	} {
		// With choices, the prompt is AnswerPrompt's. This model's template makes both the same, so the position is.
		plain, err := r.prompts.Prompt(t.Context(), chat(c.question))
		if err != nil {
			t.Fatal(err)
		}
		constrained, err := r.prompts.AnswerPrompt(t.Context(), chat(c.question))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(plain, constrained) {
			t.Fatalf("%q: the prompts of free and constrained completions differ: %v, %v", c.question, plain, constrained)
		}
		request := child.GenerateRequest{Messages: chat(c.question), MaxTokens: 1, LogProbs: true, TopLogProbs: 20}
		ask(t, r, request)
		free := ask(t, r, request)
		guided := ask(t, r, child.GenerateRequest{Messages: chat(c.question), Constraint: choose(letters...), LogProbs: true, TopLogProbs: 20})
		if len(guided.LogProbs) != 1 || len(guided.LogProbs[0].Top) != len(letters) {
			t.Fatalf("%q: got %+v, want one token with four alternatives", c.question, guided.LogProbs)
		}
		logProb := func(a answer, letter string) (float64, bool) {
			i := slices.IndexFunc(a.LogProbs[0].Top, func(p child.TokenLogProb) bool { return string(p.Bytes) == letter })
			if i < 0 {
				return 0, false
			}
			return a.LogProbs[0].Top[i].LogProb, true
		}
		best, bestLogProb := "", math.Inf(-1)
		var present []string
		freeSum, guidedSum := 0.0, 0.0
		for _, letter := range letters {
			p, ok := logProb(free, letter)
			if !ok {
				continue // less likely than those that are present
			}
			present = append(present, letter)
			if p > bestLogProb {
				best, bestLogProb = letter, p
			}
			g, _ := logProb(guided, letter)
			freeSum += math.Exp(p)
			guidedSum += math.Exp(g)
		}
		if len(present) < c.present {
			t.Errorf("%q: of the letters %q are among the 20 most likely tokens, want %d of them", c.question, present, c.present)
			continue
		}
		if guided.Text != best {
			t.Errorf("%q: constrained answer %q, most likely letter %q: free %+v, constrained %+v", c.question, guided.Text, best, free.LogProbs[0].Top, guided.LogProbs[0].Top)
		}
		for _, letter := range present {
			p, _ := logProb(free, letter)
			g, _ := logProb(guided, letter)
			want, got := math.Exp(p)/freeSum, math.Exp(g)/guidedSum
			if math.Abs(got-want) > tolerance {
				t.Errorf("%q: %s has probability %v among %q, want %v", c.question, letter, got, present, want)
			}
		}
		answers[guided.Text]++
	}
	if len(answers) != len(letters) {
		t.Errorf("the answers %v do not show every letter once, so a constant answer could pass", answers)
	}
}

func TestRefusals(t *testing.T) {
	r := sharedRunner(t)
	long := strings.Repeat("word ", 1100)
	for _, c := range []struct {
		name string
		req  child.GenerateRequest
		code string
		want string
	}{
		{"context", child.GenerateRequest{Messages: chat(long)}, child.CodeContextLength, "1024"},
		{"context of a text", child.GenerateRequest{Prompt: &long}, child.CodeContextLength, "1101"},
		{"nothing", child.GenerateRequest{}, child.CodeInvalidRequest, "prompt"},
		{"max_tokens", child.GenerateRequest{Messages: chat("x"), MaxTokens: -1}, child.CodeInvalidRequest, "max_tokens"},
		{"temperature", child.GenerateRequest{Messages: chat("x"), Temperature: math.NaN()}, child.CodeInvalidRequest, "temperature"},
		{"top_p", child.GenerateRequest{Messages: chat("x"), TopP: -1}, child.CodeInvalidRequest, "top_p"},
		{"top_logprobs", child.GenerateRequest{Messages: chat("x"), TopLogProbs: 21}, child.CodeInvalidRequest, "top_logprobs"},
		{"stop", child.GenerateRequest{Messages: chat("x"), Stop: []string{""}}, child.CodeInvalidRequest, "stop"},
		{"choices", child.GenerateRequest{Messages: chat("x"), Constraint: choose("A", "A")}, child.CodeInvalidRequest, "choices"},
		{"adapter", child.GenerateRequest{Messages: chat("x"), Adapter: &child.Adapter{ID: "a", Path: "missing.gguf"}}, child.CodeInvalidAdapter, "missing.gguf"},
	} {
		_, err := generate(t.Context(), r, c.req)
		var refusal *child.Error
		if !errors.As(err, &refusal) || refusal.Code != c.code || !strings.Contains(refusal.Message, c.want) {
			t.Errorf("%s: got %v, want code %s and %q in the message", c.name, err, c.code, c.want)
		}
	}
}

func TestCancelFreesTheSlot(t *testing.T) {
	r := sharedRunner(t)
	var wg sync.WaitGroup
	for i := range 12 { // more than are decoded at once: some are cancelled while they wait
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			defer cancel()
			events := 0
			err := r.Generate(ctx, child.GenerateRequest{Messages: chat(fmt.Sprint("Tell me a long story about number ", i)), TopP: 1}, func(child.GenerateEvent) error {
				if events++; events == 1+i%4 {
					cancel()
				}
				return nil
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("sequence %d: %v, want it cancelled", i, err)
			}
		})
		if i%3 == 2 {
			cancel() // before it began
		}
	}
	wg.Wait()
	status, err := r.Status(t.Context())
	if err != nil || status.Running != 0 || status.Waiting != 0 {
		t.Errorf("after all were cancelled: %+v, %v", status, err)
	}
	// A prompt that is being computed is aborted.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := generate(ctx, r, child.GenerateRequest{Messages: chat(strings.Repeat("all different 1 2 3 ", 100))}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	start := time.Now()
	if status, err = r.Status(t.Context()); err != nil || status.Running != 0 {
		t.Errorf("after the abort: %+v, %v", status, err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("the batch of a cancelled request held the runner for %v", took)
	}
}

// The cache is a pool: when its sequences outgrow it together, the last one waits and is computed again.
func TestCacheOverflow(t *testing.T) {
	// Three prompts of about 300 tokens in a pool of 512 cells.
	r, err := New(Options{ModelDir: modelDir(t), ContextTokens: 512, Sequences: 4, Threads: 1, CacheTokens: 512})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	want := make([]answer, 3)
	prompts := make([]string, 3)
	for i := range prompts {
		prompts[i] = strings.Repeat(fmt.Sprintf("%d bottles of beer. ", i+3), 50)
		want[i] = ask(t, r, child.GenerateRequest{Prompt: &prompts[i], MaxTokens: 100})
	}
	got := make([]answer, 3)
	var wg sync.WaitGroup
	for i := range prompts {
		wg.Go(func() {
			got[i], _ = generate(t.Context(), r, child.GenerateRequest{Prompt: &prompts[i], MaxTokens: 100})
		})
	}
	wg.Wait()
	for i := range prompts {
		if got[i].Text != want[i].Text {
			t.Errorf("crowded: %q, alone: %q", got[i].Text, want[i].Text)
		}
	}
	if status, err := r.Status(t.Context()); err != nil || status.Displaced == 0 {
		t.Errorf("no sequence had to wait for room, so nothing was tested: %+v, %v", status, err)
	}
	r.Close()
	if _, err := generate(t.Context(), r, child.GenerateRequest{Messages: chat("x")}); err == nil {
		t.Error("a closed runner answered")
	}
}

// randomAdapter writes a LoRA adapter of the default model's q and v with random weights, large enough to change
// what it says.
func randomAdapter(t testing.TB, seed uint64) string {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 1))
	const rank, width, kv = 8, 576, 192
	matrix := func(columns, rows int64, scale float64) gguf.TensorData {
		data := make([]byte, 0, 4*columns*rows)
		for range columns * rows {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(random.NormFloat64()*scale)))
		}
		return gguf.TensorData{Shape: []int64{columns, rows}, Type: gguf.F32, Data: data}
	}
	var tensors []gguf.TensorData
	for layer := range 30 {
		for _, target := range []struct { // in this order: the weights follow from the seed
			name string
			rows int64
		}{{"attn_q", width}, {"attn_v", kv}} {
			a, b := matrix(width, rank, 0.1), matrix(rank, target.rows, 0.1)
			a.Name = fmt.Sprintf("blk.%d.%s.weight.lora_a", layer, target.name)
			b.Name = fmt.Sprintf("blk.%d.%s.weight.lora_b", layer, target.name)
			tensors = append(tensors, a, b)
		}
	}
	path := filepath.Join(t.TempDir(), "adapter.gguf")
	err := gguf.WriteFile(path, []gguf.KeyValue{
		{Key: "general.type", Value: "adapter"},
		{Key: "general.architecture", Value: "llama"},
		{Key: "adapter.type", Value: "lora"},
		{Key: "adapter.lora.alpha", Value: float32(16)},
	}, tensors)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// distance is the sum over the named alternatives of both answers' first tokens of how far their probabilities differ;
// what an answer does not name counts as 0. It is from 0 to 2.
func distance(a, b answer) float64 {
	difference := map[string]float64{}
	for _, p := range a.LogProbs[0].Top {
		difference[string(p.Bytes)] += math.Exp(p.LogProb)
	}
	for _, p := range b.LogProbs[0].Top {
		difference[string(p.Bytes)] -= math.Exp(p.LogProb)
	}
	sum := 0.0
	for _, d := range difference {
		sum += math.Abs(d)
	}
	return sum
}

func TestAdapters(t *testing.T) {
	r := sharedRunner(t)
	one := &child.Adapter{ID: "one", Path: randomAdapter(t, 5)}
	two := &child.Adapter{ID: "two", Path: randomAdapter(t, 6)}
	request := func(a *child.Adapter) child.GenerateRequest {
		return child.GenerateRequest{
			Messages: chat("Which letter comes after B?"), Constraint: choose("A", "B", "C", "D", "E", "F", "G", "H"), Adapter: a, LogProbs: true, TopLogProbs: 20,
		}
	}
	// Which cells of the pool a prompt gets depends on the tests before, and the order of cells on the rounding (see
	// series): the same adapter's answers are nearly always equal to the bit, and never far apart.
	const same = 0.15
	ask(t, r, request(nil))
	base := ask(t, r, request(nil))
	ask(t, r, request(one))
	withOne := ask(t, r, request(one))
	ask(t, r, request(two))
	withTwo := ask(t, r, request(two))
	if a, b, c := distance(base, withOne), distance(base, withTwo), distance(withOne, withTwo); min(a, b, c) < 0.4 {
		t.Errorf("the adapters change too little for this test: distances %.3f, %.3f, %.3f", a, b, c)
	}
	for range 2 {
		if d := distance(base, ask(t, r, request(nil))); d > same {
			t.Fatalf("the base model after an adapter is %.3f from what it was before", d)
		}
		if d := distance(withOne, ask(t, r, request(one))); d > same {
			t.Fatalf("an adapter after the base model is %.3f from what it was before", d)
		}
	}

	// All at once they take turns, and none of them changes another's text.
	var wg sync.WaitGroup
	want := map[*child.Adapter]answer{nil: base, one: withOne, two: withTwo}
	for i, c := range []*child.Adapter{nil, one, two, nil, one, two} {
		wg.Go(func() {
			got, err := generate(t.Context(), r, request(c))
			if err != nil {
				t.Error(err)
				return
			}
			// See series: not equal, but nearer to what the same adapter says alone than to what another does. Measured:
			// up to 0.45 from the same adapter's, with these ones, which are far from what training makes.
			own := distance(got, want[c])
			for other, answer := range want {
				if d := distance(got, answer); other != c && d <= own {
					t.Errorf("request %d at the same time is %.3f from what it says alone and %.3f from what another adapter says", i, own, d)
				}
			}
		})
	}
	wg.Wait()

	status, err := r.Status(t.Context())
	if err != nil || !slices.Equal(status.Adapters, []string{"one", "two"}) {
		t.Errorf("loaded adapters %v, %v", status.Adapters, err)
	}
	if !r.UnloadAdapter("one") || r.UnloadAdapter("one") {
		t.Error("unloading is reported wrongly")
	}
	// Loaded again, and again the same.
	ask(t, r, request(one))
	if d := distance(withOne, ask(t, r, request(one))); d > same {
		t.Errorf("an adapter loaded again is %.3f from what it was before", d)
	}
	if !r.UnloadAdapter("one") || !r.UnloadAdapter("two") {
		t.Error("unloading at the end is reported wrongly")
	}
}

// Requests of one adapter that keep coming must not keep another's waiting.
func TestAdaptersTakeTurns(t *testing.T) {
	r := sharedRunner(t)
	a := &child.Adapter{ID: "turns", Path: randomAdapter(t, 3)}
	defer r.UnloadAdapter("turns")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	started := make(chan struct{}, 100)
	for i := range 3 {
		wg.Go(func() {
			for ctx.Err() == nil {
				_ = r.Generate(ctx, child.GenerateRequest{Messages: chat(fmt.Sprint("Count slowly to one million, step ", i)), TopP: 1}, func(child.GenerateEvent) error {
					select {
					case started <- struct{}{}:
					default:
					}
					return nil
				})
			}
		})
	}
	<-started
	got := ask(t, r, child.GenerateRequest{Messages: chat("Hello"), MaxTokens: 3, Adapter: a})
	if got.Finish == "" { // it may well say nothing: its weights are random
		t.Errorf("got %+v", got)
	}
	cancel()
	wg.Wait()
}

func TestInvalidAdapter(t *testing.T) {
	r := sharedRunner(t)
	before := ask(t, r, child.GenerateRequest{Messages: chat("Hi"), MaxTokens: 4, LogProbs: true})
	good, err := os.ReadFile(randomAdapter(t, 4))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"empty":     nil,
		"magic":     append([]byte("XXXX"), good[4:]...),
		"truncated": good[:len(good)/2],
		"header":    good[:200],
		"other":     bytes.Replace(good, []byte("blk.7.attn_q"), []byte("blk.7.attn_z"), 1),
	} {
		path := filepath.Join(t.TempDir(), name+".gguf")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := generate(t.Context(), r, child.GenerateRequest{Messages: chat("Hi"), Adapter: &child.Adapter{ID: name, Path: path}})
		var refusal *child.Error
		if !errors.As(err, &refusal) || refusal.Code != child.CodeInvalidAdapter {
			t.Errorf("%s: got %v, want %s", name, err, child.CodeInvalidAdapter)
		}
	}
	whole := &child.Adapter{ID: "changed", Path: filepath.Join(t.TempDir(), "whole.gguf"), SHA256: strings.Repeat("0", 64)}
	if err := os.WriteFile(whole.Path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := generate(t.Context(), r, child.GenerateRequest{Messages: chat("Hi"), Adapter: whole}); err == nil || !strings.Contains(err.Error(), "whole.gguf is damaged") {
		t.Errorf("with another sha256: got %v, want that it is damaged", err)
	}
	after := ask(t, r, child.GenerateRequest{Messages: chat("Hi"), MaxTokens: 4, LogProbs: true})
	if before.Text != after.Text {
		t.Errorf("after the refusals %q, before %q", after.Text, before.Text)
	}
}

// A cache of more cells than the model's context is no reason to warn, a longer sequence is.
func TestContextWarning(t *testing.T) {
	for context, want := range map[int]bool{512: false, 8448: true} {
		var log bytes.Buffer
		r, err := New(Options{ModelDir: modelDir(t), ContextTokens: context, Sequences: 1, Threads: 1, CacheTokens: 8448,
			Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))})
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		lines := strings.Count(log.String(), "\n")
		if got := strings.Contains(log.String(), "context_tokens=8448 trained_context_tokens=8192"); got != want || lines > 1 || !want && lines > 0 {
			t.Errorf("context of %d tokens: logged %q, want one warning: %v", context, log.String(), want)
		}
	}
}

func TestInvalidModel(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "base.gguf"), []byte("GGUF and nothing else"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := New(Options{ModelDir: dir})
	var refusal *child.Error
	if !errors.As(err, &refusal) || refusal.Code != child.CodeInvalidModel {
		t.Errorf("got %v, want %s", err, child.CodeInvalidModel)
	}
}

func choose(choices ...string) *child.Constraint {
	return &child.Constraint{Kind: child.ConstraintChoice, Choices: choices}
}
