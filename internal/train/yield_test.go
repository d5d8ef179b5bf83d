package train

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// A busy child is seen among all other processes and among the children, and what this process uses is not.
func TestLoad(t *testing.T) {
	others := load{used: othersUsed}
	children := load{used: func() (time.Duration, error) { return childrenUsed(os.Getpid(), 0) }}
	if others.busy() || children.busy() {
		t.Error("an average since nothing")
	}
	for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end); {
	}
	if children.busy() {
		t.Error("what this process uses is taken for a child's")
	}
	child := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = others.busy(), children.busy() // the averages start here
	time.Sleep(600 * time.Millisecond)
	_, _ = others.busy(), children.busy()
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // it was killed
	// On a machine with other load, the busy process takes its share of that.
	if !(others.cores > 0.1) || !(children.cores > 0.1) {
		t.Errorf("%.2f cores used by others beside a busy process, %.2f by children", others.cores, children.cores)
	}
	if used, err := childrenUsed(os.Getpid(), 0); err != nil || used != 0 {
		t.Errorf("without children, %v is used, %v", used, err)
	}
}
