package child

import (
	"errors"
	"syscall"
	"testing"
)

func TestTrainerStops(t *testing.T) {
	t.Parallel()
	trainer, err := StartTrainer(TrainerOptions{Config: TrainerConfig{JobID: "ftjob-1"}})
	if err != nil {
		t.Fatal(err)
	}
	steps := 0
	for event := range trainer.Events() {
		switch event.Type {
		case EventStep:
			if event.Step != steps {
				t.Fatalf("step %d came as number %d", event.Step, steps)
			}
			if steps++; steps == 1000 {
				if err := trainer.Stop(); err != nil {
					t.Fatal(err)
				}
			}
		case EventSaved:
			if event.Message != "ftjob-1" {
				t.Errorf("the trainer's configuration had job %q", event.Message)
			}
			steps++
		}
	}
	if err := trainer.Wait(); err != nil || steps != 1001 {
		t.Errorf("after %d events the trainer ended with %v", steps, err)
	}
	trainer.Kill()
}

// TestTrainerKilledUnread kills a trainer whose events nobody reads: nothing may be left waiting, which TestMain checks.
func TestTrainerKilledUnread(t *testing.T) {
	t.Parallel()
	trainer, err := StartTrainer(TrainerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	trainer.Kill()
	var exit *ExitError
	if err := trainer.Wait(); !errors.As(err, &exit) || exit.Signal != syscall.SIGKILL {
		t.Errorf("the trainer ended with %v, want SIGKILL", err)
	}
}
