package graph

import (
	"fmt"
	"syscall"
	"unsafe"
)

// mapping is memory outside of Go's heap that takes nothing until it is touched.
type mapping []byte

func reserve(bytes int) (mapping, error) {
	if bytes == 0 {
		return nil, nil
	}
	m, err := syscall.Mmap(-1, 0, bytes, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON|syscall.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes: %w", bytes, err)
	}
	return m, nil
}

// untouch gives the memory from offset on back; it is zero when it is touched again.
func (m mapping) untouch(offset int) {
	const page = 1 << 16
	if offset = (offset + page - 1) / page * page; offset < len(m) {
		_ = syscall.Madvise(m[offset:], syscall.MADV_DONTNEED)
	}
}

func (m mapping) release() {
	if m != nil {
		_ = syscall.Munmap(m)
	}
}

// rowOf is a row of a slot of float32 rows.
func rowOf(s slot, row, width int) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(&s.memory[4*row*width])), width)
}
