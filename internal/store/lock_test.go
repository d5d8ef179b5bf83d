package store

import (
	"syscall"
	"testing"
)

// TestFreeLock frees a lock whose file has another descriptor, as between the fork and the exec of a child process.
func TestFreeLock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	lock, err := takeLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	child, err := syscall.Dup(int(lock.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(child)
	if err := freeLock(lock); err != nil {
		t.Error(err)
	}
	again, err := takeLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := freeLock(again); err != nil {
		t.Error(err)
	}
}
