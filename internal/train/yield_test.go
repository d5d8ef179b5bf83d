package train

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// What other processes use is told apart from what this one uses.
func TestLoadOfOthers(t *testing.T) {
	spin := func(d time.Duration) {
		for end := time.Now().Add(d); time.Now().Before(end); {
		}
	}
	var l neighbours
	if _, ok := l.cores(); ok {
		t.Error("an average since nothing")
	}
	if _, ok := l.cores(); ok {
		t.Error("an average over no time")
	}
	spin(400 * time.Millisecond)
	before, ok := l.cores()
	if !ok {
		t.Fatal("no average after 400 ms")
	}
	busy := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
	busy.Env = os.Environ()
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(600 * time.Millisecond)
	during, _ := l.cores()
	if err := busy.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = busy.Wait() // it was killed
	// On a machine with other load, the busy process takes its share of that.
	if !(during > 0.1) {
		t.Errorf("%.2f cores used by others beside a busy process, %.2f without", during, before)
	}
}
