package ggml

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNoDevice(t *testing.T) {
	t.Parallel()
	empty := t.TempDir()
	if _, err := OpenGPU(empty); !errors.Is(err, ErrNoDevice) || !strings.Contains(err.Error(), "make cuda") {
		t.Errorf("an empty directory: %v", err)
	}
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "libggml-cuda.so"), []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenGPU(broken); !errors.Is(err, ErrNoDevice) {
		t.Errorf("a file that is no library: %v", err)
	}
}

// On a CPU, what devices need does nothing.
func TestHostBackend(t *testing.T) {
	t.Parallel()
	backend, err := NewCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	if _, gpu := backend.Device(); gpu || backend.GPU() {
		t.Error("a CPU backend is no GPU")
	}
	values, buffer := backend.HostFloats(5)
	if len(values) != 5 || buffer != nil {
		t.Errorf("%d values, buffer %v", len(values), buffer)
	}
}
