//go:build faults

package faults

import (
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestTwoServers starts a second server on a data directory that has one, and one after the first was killed.
func TestTwoServers(t *testing.T) {
	p := prove(t, "R14", "a second server on the same data directory", "it ends within a second and names the first's process; after a SIGKILL of the first the next one starts")
	home := newHome(t)
	var slowest time.Duration
	for range 5 {
		first := start(t, home)
		began := time.Now()
		second, err := tryStart(t, home)
		slowest = max(slowest, time.Since(began))
		if err == nil {
			second.kill()
			t.Fatal("two servers run on one data directory")
		}
		if pid := strconv.Itoa(first.cmd.Process.Pid); !strings.Contains(err.Error(), pid) {
			t.Errorf("the refusal does not name process %s: %v", pid, err)
		}
		p.inject(1)
		first.kill()
	}
	if slowest > time.Second {
		t.Errorf("the refusal took %v", slowest)
	}
	p.found("refused by name, in %v at most; 5 of 5 started again after a SIGKILL", slowest.Round(time.Millisecond))
}

// TestSmoke trains the tiny model and asks the tuned one, without any fault: the other tests stand on it.
func TestSmoke(t *testing.T) {
	s := start(t, newHome(t))
	j := s.train(t, s.upload(t, "train.jsonl", rows(10)), map[string]any{"r": 4, "num_train_epochs": 3, "batch_size": 4, "learning_rate": 2e-3})
	if j = s.await(t, j.ID, time.Minute); j.Status != "succeeded" {
		t.Fatalf("the job is %+v", j)
	}
	if text, _, err := s.chat(t.Context(), j.FineTunedModel, "问 1", 4); err != nil {
		t.Fatalf("%q, %v", text, err)
	}
	if code, took := s.stop(t); code != 0 {
		t.Errorf("SIGTERM ended the server with %d after %v", code, took)
	}
}
