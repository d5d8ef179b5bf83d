package train

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/modeltest"
)

// The peak of a trainer process is within a tenth of the estimate that it reported before it loaded anything.
func TestMemoryIsEstimated(t *testing.T) {
	for name, c := range map[string]struct {
		layout    string
		validates bool
		choices   []string
	}{
		"exact":                  {layout: "exact"},
		"middle":                 {layout: "middle"},
		"low":                    {layout: "low"},
		"exact with evaluations": {layout: "exact", validates: true},
		"middle with choices":    {layout: "middle", validates: true, choices: []string{"A", "B", "C", "D"}},
	} {
		t.Run(name, func(t *testing.T) {
			config := defaultModelJob(t)
			if c.validates {
				config.ValidationFile = writeRows(t, config.ModelDir, "more.jsonl", 60)
			}
			config.Options = child.TrainOptions{MaxSteps: ptr(2), BatchSize: ptr(8), PrefixSharing: ptr(false), Memory: &c.layout, Choices: c.choices}
			events, _ := runProcess(t, config, -1)
			if n := len(eventsOf(events, child.EventEval)); (n > 0) != c.validates {
				t.Fatalf("%d evaluations", n)
			}
			memory := eventsOf(events, child.EventMemory)[0].Memory
			done := eventsOf(events, child.EventDone)[0].Message
			var peak, estimate float64
			_, text, _ := strings.Cut(done, "memory at most ")
			if _, err := fmt.Sscanf(text, "%f MiB, estimated %f MiB", &peak, &estimate); err != nil {
				t.Fatalf("%q: %v", done, err)
			}
			t.Logf("%s; %+v", done, *memory)
			if math.Abs(peak/estimate-1) > 0.1 {
				t.Errorf("the peak was %g MiB, estimated %g MiB", peak, estimate)
			}
		})
	}
}

// defaultModelJob is tinyJob with the default model, 40 rows and no validation.
func defaultModelJob(t *testing.T) child.TrainerConfig {
	t.Helper()
	config := tinyJob(t)
	if err := os.Remove(filepath.Join(config.ModelDir, "base.gguf")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(modeltest.Path(t), filepath.Join(config.ModelDir, "base.gguf")); err != nil {
		t.Fatal(err)
	}
	config.Threads, config.ValidationFile = 2, ""
	config.TrainingFile = writeRows(t, filepath.Dir(config.TrainingFile), "rows.jsonl", 40)
	return config
}

// Memory that was granted decides: less gives smaller micro-batches and layouts, with a warning, and too little a refusal
// with the numbers.
func TestMemoryBudget(t *testing.T) {
	config := tinyJob(t)
	config.DryRun = true
	need := eventsOf(runJob(t, config, 0), child.EventMemory)[0].Memory
	if need.Layout != "exact" || need.Recompute {
		t.Errorf("plan %+v, expected the exact layout", need)
	}
	config.MemoryBytes = 1 << 20
	failed := eventsOf(runJob(t, config, 0), child.EventFailed)
	if len(failed) != 1 || failed[0].Error.Code != child.CodeInsufficientMemory || !strings.Contains(failed[0].Error.Message, "1 MiB are free") {
		t.Fatalf("with 1 MiB: %+v", failed)
	}
}

// Between what the default plan takes and the least, a job trains in what it has, and says so; where it may not, the refusal
// says what would fit.
func TestMemoryBudgetInBetween(t *testing.T) {
	config := defaultModelJob(t)
	config.DryRun = true
	config.Options = child.TrainOptions{BatchSize: ptr(8)}
	plan := func(memory string, budget int64) ([]child.TrainerEvent, child.MemoryPlan) {
		config.Options.Memory, config.MemoryBytes = &memory, budget
		events := runJob(t, config, 0)
		if list := eventsOf(events, child.EventMemory); len(list) == 1 {
			return events, *list[0].Memory
		}
		return events, child.MemoryPlan{}
	}
	_, exact := plan("auto", 0)
	_, low := plan("low", 0)
	if exact.Layout != "exact" || low.Layout != "low" || low.TotalBytes > exact.TotalBytes*3/4 {
		t.Fatalf("exact %+v, low %+v: the test needs a gap between them", exact, low)
	}
	budget := (exact.TotalBytes + low.TotalBytes) / 2
	events, got := plan("auto", budget)
	warnings := ""
	for _, e := range eventsOf(events, child.EventLog) {
		warnings += e.Message + "\n"
	}
	if got.Layout == "exact" || got.TotalBytes > budget || !strings.Contains(warnings, fmt.Sprintf("Training with memory %s", got.Layout)) ||
		!strings.Contains(warnings, fmt.Sprintf("and %d MiB are free", budget>>20)) {
		t.Errorf("with %d MiB: %+v, %q", budget>>20, got, warnings)
	}

	budget = low.TotalBytes + low.TotalBytes/20
	events, _ = plan("exact", budget)
	failed := eventsOf(events, child.EventFailed)
	if len(failed) != 1 || failed[0].Error.Code != child.CodeInsufficientMemory {
		t.Fatalf("exact with %d MiB: %+v", budget>>20, failed)
	}
	var layout string
	var tokens, needed int
	_, advice, _ := strings.Cut(failed[0].Error.Message, "MiB are free: ")
	if _, err := fmt.Sscanf(advice, "%q as memory with %d as micro_batch_tokens would fit, in %d MiB", &layout, &tokens, &needed); err != nil {
		t.Fatalf("%q: %v", failed[0].Error.Message, err)
	}
	config.Options.MicroBatchTokens = &tokens
	if _, got := plan(layout, budget); got.Layout != layout || got.MicroBatchTokens != tokens {
		t.Errorf("what it advises, %s with %d tokens, gives %+v", layout, tokens, got)
	}
}

func TestSettingsGoFromFastToSmall(t *testing.T) {
	all := settings(child.TrainOptions{}, false)
	if first, last := all[0], all[len(all)-1]; first != (setting{"exact", 1024, false}) || last != (setting{"low", 256, true}) {
		t.Errorf("on the CPU: first %+v, last %+v", first, last)
	}
	for _, s := range settings(child.TrainOptions{}, true) {
		if s.layout == "low" {
			t.Errorf("on a GPU: %+v without being asked", s)
		}
	}
	for _, s := range settings(child.TrainOptions{Memory: ptr("low"), MicroBatchTokens: ptr(100)}, true) {
		if s.layout != "low" || s.microTokens != 100 {
			t.Errorf("as asked for: %+v", s)
		}
	}
}

// The rows of a file stay on disk: what a trainer takes does not grow with them, but for an index. HONE_TEST_ROWS sets their
// number, such as 1000000, and takes the default model.
func TestManyRows(t *testing.T) {
	config, many := tinyJob(t), 30_000
	if n, err := strconv.Atoi(os.Getenv("HONE_TEST_ROWS")); err == nil {
		config, many = defaultModelJob(t), n
	}
	config.ValidationFile = ""
	config.Options = child.TrainOptions{MaxSteps: ptr(8), BatchSize: ptr(8), MicroBatchTokens: ptr(256)}
	measure := func(rows int) (peak float64) {
		config.TrainingFile = writeRows(t, filepath.Dir(config.ModelDir), "many.jsonl", rows)
		config.Dir, config.AdapterDir = filepath.Join(t.TempDir(), "a1"), filepath.Join(t.TempDir(), "adapter")
		began := time.Now()
		events, _ := runProcess(t, config, -1)
		took := time.Since(began)
		data := eventsOf(events, child.EventDataset)[0]
		if data.TrainRows != rows || len(eventsOf(events, child.EventStep)) != 8 {
			t.Fatalf("%d rows, %d steps; expected %d and 8", data.TrainRows, len(eventsOf(events, child.EventStep)), rows)
		}
		done := eventsOf(events, child.EventDone)[0].Message
		_, text, _ := strings.Cut(done, "memory at most ")
		if _, err := fmt.Sscanf(text, "%f MiB", &peak); err != nil {
			t.Fatalf("%q: %v", done, err)
		}
		t.Logf("%d rows, %d tokens: memory at most %g MiB; %s in all; %s", rows, data.TrainTokens, peak, took.Round(100*time.Millisecond), done)
		return peak
	}
	few := measure(1000)
	if grown, allowed := measure(many)-few, 24+48*float64(many)/(1<<20); grown > allowed {
		t.Errorf("%d rows take %g MiB more than 1,000; expected at most %.0f", many, grown, allowed)
	}
}
