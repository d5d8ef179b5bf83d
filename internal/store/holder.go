package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Holder reports whether a process has the data directory open, and which: 0 if it has not written its id. Nothing is
// made or changed there. It takes the lock for a moment, shared, to see whether that can be done: a server that starts
// in this moment would be refused.
func Holder(dir string) (pid int, held bool, err error) {
	file, err := os.Open(filepath.Join(dir, "hone.lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer file.Close()
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	switch {
	case err == nil:
		return 0, false, nil
	case errors.Is(err, syscall.EWOULDBLOCK):
		return readPID(file), true, nil
	}
	return 0, false, fmt.Errorf("lock %s: %w", file.Name(), err)
}
