// Package durable writes files that survive a power cut once the call has returned.
package durable

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
)

// WriteFile creates the file at path with the data, readable by the user alone, and fsyncs it. An existing file is an
// error. The directory's own entry is durable after SyncDir.
func WriteFile(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// SyncDir makes the entries of a directory durable: new names, renames and removals.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Digest is the sha256 of the file at path in lower-case hexadecimal digits.
func Digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
