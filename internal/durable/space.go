package durable

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// FreeBytes is the space that this user may still fill in the file system of a directory.
func FreeBytes(dir string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, err
	}
	return int64(s.Bavail) * s.Bsize, nil
}

// DiskFull reports whether an error says that there is no space left, on the disk or in the user's quota.
func DiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
