package ggml

/*
#include <stdlib.h>
#include "kernels.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/hone-llm/hone/internal/engine"
)

// ErrNoDevice reports that this installation has no GPU backend, or that it finds no device.
var ErrNoDevice = errors.New("no GPU")

// Device is a GPU.
type Device struct {
	Name                   string // "CUDA0"
	Description            string // "NVIDIA H100 80GB HBM3"
	FreeBytes, MemoryBytes int

	c *C.struct_ggml_backend_device
}

// LibraryDirectory is where GPU backends of this installation lie: ../lib/hone beside the executable, or the directory
// in HONE_LIB.
func LibraryDirectory() (string, error) {
	if dir := os.Getenv("HONE_LIB"); dir != "" {
		return filepath.Abs(dir)
	}
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(exe), "..", "lib", "hone"), nil
}

// loaded keeps the libraries of this process, by path: they register process-wide and stay until its end.
var loaded struct {
	sync.Mutex
	registries map[string]*C.struct_ggml_backend_reg
}

// Devices lists the GPUs that the backends in dir (LibraryDirectory's, if it is empty) find. Its error is ErrNoDevice
// with the reason.
func Devices(dir string) ([]Device, error) {
	if dir == "" {
		var err error
		if dir, err = LibraryDirectory(); err != nil {
			return nil, err
		}
	}
	path := filepath.Join(dir, "libggml-cuda.so")
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("%w: %w (make cuda builds it)", ErrNoDevice, err)
	}
	loaded.Lock()
	defer loaded.Unlock()
	registry := loaded.registries[path]
	if registry == nil {
		name := C.CString(path)
		defer C.free(unsafe.Pointer(name))
		if registry = C.ggml_backend_load(name); registry == nil {
			return nil, fmt.Errorf("%w: %s cannot be loaded; is the driver installed, and the CUDA runtime of the version that it was built with?", ErrNoDevice, path)
		}
		if loaded.registries == nil {
			loaded.registries = make(map[string]*C.struct_ggml_backend_reg)
		}
		loaded.registries[path] = registry
	}
	var devices []Device
	for i := range int(C.ggml_backend_reg_dev_count(registry)) {
		c := C.ggml_backend_reg_dev_get(registry, C.size_t(i))
		var free, total C.size_t
		C.ggml_backend_dev_memory(c, &free, &total)
		devices = append(devices, Device{C.GoString(C.ggml_backend_dev_name(c)), C.GoString(C.ggml_backend_dev_description(c)), int(free), int(total), c})
	}
	if len(devices) == 0 {
		return nil, fmt.Errorf("%w: %s finds no device", ErrNoDevice, path)
	}
	return devices, nil
}

// OpenGPU makes a backend on the device with the most free memory of those that Devices lists. Close frees it.
//
// One backend computes one model in one layout, and another model gets another backend: a library that was built without
// scripts/cuda's changes replays recorded CUDA graphs by the addresses and shapes of their nodes and compares no types.
func OpenGPU(dir string) (*Backend, error) {
	devices, err := Devices(dir)
	if err != nil {
		return nil, err
	}
	best := devices[0]
	for _, d := range devices {
		if d.FreeBytes > best.FreeBytes {
			best = d
		}
	}
	c := C.ggml_backend_dev_init(best.c, nil)
	if c == nil {
		return nil, fmt.Errorf("%w: %s (%s) cannot be opened", ErrNoDevice, best.Name, best.Description)
	}
	return &Backend{c: c, watch: (*C.struct_hone_watch)(C.calloc(1, C.sizeof_struct_hone_watch)), device: &best}, nil
}

// Device is the backend's GPU; a CPU backend has none.
func (b *Backend) Device() (Device, bool) {
	if b.device == nil {
		return Device{}, false
	}
	d := *b.device
	var free, total C.size_t
	C.ggml_backend_dev_memory(d.c, &free, &total)
	d.FreeBytes, d.MemoryBytes = int(free), int(total)
	return d, true
}

// GPU says whether the backend computes on one.
func (b *Backend) GPU() bool { return b.device != nil }

// HostFloats allocates n float32 values in host memory that the device copies from and to fastest, zeroed. The buffer
// is nil where ordinary memory is as good.
func (b *Backend) HostFloats(n int) ([]float32, *Buffer) {
	if b.device != nil && n > 0 {
		if kind := C.ggml_backend_dev_host_buffer_type(b.device.c); kind != nil {
			if c := C.ggml_backend_buft_alloc_buffer(kind, C.size_t(4*n)); c != nil {
				values := unsafe.Slice((*float32)(C.ggml_backend_buffer_get_base(c)), n)
				clear(values)
				return values, &Buffer{c}
			}
		}
	}
	return make([]float32, n), nil
}

// Weights marks the buffer's tensors as constants, which lets a device choose other kernels for them.
func (b *Buffer) Weights() {
	C.ggml_backend_buffer_set_usage(b.c, C.HONE_GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
}

// RowBytes is the size of n elements of a type, n whole blocks.
func RowBytes(t Type, n int) int { return int(C.ggml_row_size(C.uint(t), C.int64_t(n))) }

// computeOnDevice computes the graph; Abort takes effect before it and after it. The batch size of 1 keeps CUDA graphs
// on (ggml's heuristic takes larger ones for prompts, whose shape changes).
func (b *Backend) computeOnDevice(g *Graph) error {
	if atomic.LoadInt32((*int32)(unsafe.Pointer(&b.watch.stop))) != 0 {
		return ErrAborted
	}
	status := C.ggml_backend_graph_compute_async(b.c, g.c, 1)
	C.ggml_backend_synchronize(b.c)
	if atomic.LoadInt32((*int32)(unsafe.Pointer(&b.watch.stop))) != 0 {
		return ErrAborted
	}
	switch status {
	case C.HONE_GGML_STATUS_SUCCESS:
		atomic.AddInt32((*int32)(unsafe.Pointer(&b.watch.nodes)), int32(g.Nodes()))
		return nil
	case C.HONE_GGML_STATUS_ALLOC_FAILED:
		return fmt.Errorf("compute: %w", ErrMemory)
	}
	return &engine.Error{Op: "ggml_backend_graph_compute_async", Code: int(status)}
}
