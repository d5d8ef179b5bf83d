package train

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/modeltest"
)

// The peak of a trainer process is within a tenth of the estimate that it reported before it loaded anything.
func TestMemoryIsEstimated(t *testing.T) {
	for _, layout := range []string{"exact", "low"} {
		t.Run(layout, func(t *testing.T) {
			config := tinyJob(t)
			if err := os.Remove(filepath.Join(config.ModelDir, "base.gguf")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(modeltest.Path(t), filepath.Join(config.ModelDir, "base.gguf")); err != nil {
				t.Fatal(err)
			}
			config.Threads, config.ValidationFile = 2, ""
			config.Options = child.TrainOptions{MaxSteps: ptr(2), BatchSize: ptr(8), PrefixSharing: ptr(false), Memory: &layout}
			config.TrainingFile = writeRows(t, filepath.Dir(config.TrainingFile), "rows.jsonl", 40)
			events, _ := runProcess(t, config, -1)
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
