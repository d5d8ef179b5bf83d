package train

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/lora"
)

// childVariable makes this test program a trainer process, as `hone trainer` is one.
const childVariable = "HONE_TEST_TRAINER"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) == "" {
		os.Exit(m.Run())
	}
	in := bufio.NewReader(os.Stdin)
	var config child.TrainerConfig
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &config)
	}
	if err == nil {
		err = Run(context.Background(), config, in, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// runProcess runs a trainer process and returns its events and whether it ended by itself. It is killed a share of a step
// after it has reported so many steps, if that is not negative.
func runProcess(t *testing.T, config child.TrainerConfig, killAfter float64) (events []child.TrainerEvent, ended bool) {
	t.Helper()
	line, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	process := exec.Command(os.Args[0])
	process.Env = append(os.Environ(), childVariable+"=1", "OMP_WAIT_POLICY=passive") // as child.StartTrainer
	var log bytes.Buffer
	process.Stderr = &log
	in, err := process.StdinPipe() // open while it runs
	if err != nil {
		t.Fatal(err)
	}
	out, err := process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	kill := func(reported int, perStep time.Duration) {
		if share := killAfter - float64(reported); share >= 0 && share < 1 {
			time.AfterFunc(time.Duration(share*float64(perStep)), func() { _ = process.Process.Kill() }) // it may have ended
		}
	}
	if _, err := in.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
	reported, last := 0, began
	kill(0, 50*time.Millisecond) // while it reads the model and the data
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var e child.TrainerEvent
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue // cut off
		}
		events = append(events, e)
		if e.Type == child.EventStep {
			reported++
			kill(reported, min(time.Since(last), 20*time.Millisecond)) // the first step was reported long after the start
			last = time.Now()
		}
	}
	err = process.Wait()
	if err != nil && killAfter < 0 {
		t.Fatalf("the trainer ended with %v\n%s", err, log.String())
	}
	if failed := eventsOf(events, child.EventFailed); len(failed) > 0 {
		t.Fatalf("the trainer failed: %+v", failed[0].Error)
	}
	return events, err == nil
}

// TestKills kills trainers at random moments, many while they save, and lets new attempts go on as the server does, until
// one is done: the adapter and every checkpoint that is left are those of a job that was left alone, to the last bit.
func TestKills(t *testing.T) {
	const kills = 20
	for name, prepare := range map[string]func(t *testing.T) child.TrainerConfig{
		// Several micro-batches a step, dropout, early stopping and the best checkpoint at the end.
		"supervised": func(t *testing.T) child.TrainerConfig {
			c := tinyJob(t)
			o := &c.Options
			o.NumTrainEpochs, o.LoraDropout, o.MicroBatchTokens, o.SaveMinutes = ptr(50), ptr(0.1), ptr(32), ptr(0.0)
			o.EvalStrategy, o.EvalSteps, o.LoadBestModelAtEnd, o.SaveTotalLimit = ptr("steps"), ptr(4), ptr(true), ptr(2)
			o.EarlyStoppingPatience, o.EarlyStoppingThreshold = ptr(24), ptr(0.01)
			return c
		},
		"dpo": func(t *testing.T) child.TrainerConfig {
			c := preferenceJob(t)
			c.Options.NumTrainEpochs, c.Options.LoraDropout = ptr(160), ptr(0.05) // many: a kill that comes late lets some steps pass
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			whole := prepare(t)
			began := time.Now()
			alone, _ := runProcess(t, whole, -1)
			took := time.Since(began)
			cut := prepare(t)
			cut.TrainingFile, cut.ValidationFile = whole.TrainingFile, whole.ValidationFile
			base := cut.Dir
			random := rand.New(rand.NewPCG(1, uint64(len(name))))
			killed, steps := 0, map[int]child.TrainerEvent{}
			for n := 1; ; n++ {
				cut.Attempt, cut.Dir = n, fmt.Sprintf("%s-%d", base, n)
				after := -1.0
				if killed < kills {
					after = 2.5 * random.Float64()
				}
				events, ended := runProcess(t, cut, after)
				for _, e := range eventsOf(events, child.EventStep) {
					if before, ok := steps[e.Step]; ok && before.TrainLoss != e.TrainLoss {
						t.Errorf("step %d: loss %v, after a kill %v", e.Step, before.TrainLoss, e.TrainLoss)
					}
					steps[e.Step] = e
				}
				if ended {
					break
				}
				killed++
				cut.ResumeFrom = append([]string{cut.Dir}, cut.ResumeFrom...)
			}
			if killed < kills {
				t.Errorf("%d attempts were killed before the job was done, expected %d", killed, kills)
			}
			for _, e := range eventsOf(alone, child.EventStep) {
				if steps[e.Step].TrainLoss != e.TrainLoss {
					t.Errorf("step %d: loss %v, expected %v", e.Step, steps[e.Step].TrainLoss, e.TrainLoss)
				}
			}
			for _, file := range []string{lora.GGUFFile, lora.PEFTWeights} {
				if digest(t, whole.AdapterDir, file) != digest(t, cut.AdapterDir, file) {
					t.Errorf("%s differs from that of the job that was left alone", file)
				}
			}
			left := checkpointsIn(t, base+"-*")
			for step, dir := range checkpointsIn(t, whole.Dir) {
				if left[step] == "" || digest(t, left[step], lora.GGUFFile) != digest(t, dir, lora.GGUFFile) {
					t.Errorf("checkpoint %s: %q, expected the same as in %s", step, left[step], dir)
				}
				delete(left, step)
			}
			if len(left) > 0 {
				t.Errorf("checkpoints that should be gone: %v", left)
			}
			if states, err := filepath.Glob(base + "-*/" + "*" + statePrefix + "*"); err != nil || len(states) > keptStates+1 {
				t.Errorf("resume states %v, %v: expected at most %d, and one of an attempt before", states, err, keptStates)
			}
			t.Logf("%d attempts were killed, of %d steps in %s alone", killed, len(steps), took.Round(time.Millisecond))
		})
	}
}

// checkpointsIn finds checkpoints by the name of their directory.
func checkpointsIn(t *testing.T, attempts string) map[string]string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(attempts, "checkpoints", "step-*", lora.ManifestFile))
	if err != nil {
		t.Fatal(err)
	}
	dirs := map[string]string{}
	for _, manifest := range found {
		dirs[filepath.Base(filepath.Dir(manifest))] = filepath.Dir(manifest)
	}
	return dirs
}
