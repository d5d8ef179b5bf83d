package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// InUseError says that another process has the data directory open.
type InUseError struct {
	Dir string
	PID int // 0 if it could not be read
}

func (e *InUseError) Error() string {
	who := "another hone process"
	if e.PID != 0 {
		who = fmt.Sprintf("hone process %d", e.PID)
	}
	return fmt.Sprintf("data directory %s is in use by %s; stop it or set HONE_HOME / --data-dir to another", e.Dir, who)
}

// takeLock locks dir/hone.lock and writes our process id into it. The kernel frees the lock when the file is closed or
// the process ends, however it ends, so a lock file that is there says nothing; only the flock does.
func takeLock(dir string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(dir, "hone.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, unusable(dir, err)
	}
	if err := flock(file); err != nil {
		defer file.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", file.Name(), err)
		}
		return nil, &InUseError{Dir: dir, PID: readPID(file)}
	}
	err = file.Truncate(0)
	if err == nil {
		_, err = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		return nil, errors.Join(unusable(dir, err), file.Close())
	}
	return file, nil
}

// freeLock frees the lock that takeLock took and closes its file. Closing alone would not free it at once while another
// goroutine starts a process: between its fork and its exec the child holds the file too.
func freeLock(file *os.File) error {
	return errors.Join(syscall.Flock(int(file.Fd()), syscall.LOCK_UN), file.Close())
}

func flock(file *os.File) error {
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// readPID reads the holder's process id. The holder writes it just after it took the lock, so an empty file is read again.
func readPID(file *os.File) int {
	for range 10 {
		data, err := io.ReadAll(io.NewSectionReader(file, 0, 32))
		if err != nil {
			return 0
		}
		if pid, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil {
			return pid
		}
		time.Sleep(5 * time.Millisecond)
	}
	return 0
}
