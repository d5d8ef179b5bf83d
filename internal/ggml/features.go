package ggml

/*
#include "extensions.h"
*/
import "C"

import "unsafe"

// Feature is an extension of the CPU's instruction set, under its name in /proc/cpuinfo.
type Feature struct {
	Name  string
	Built bool // the engine was compiled for it
	Has   bool // this CPU has it, and the operating system saves its registers; true on other architectures than x86-64
}

// Features lists the extensions that decide whether and how fast the engine runs. A program that was built for one that
// an x86-64 CPU lacks does not come so far: it says so and ends before main (features.c).
func Features() []Feature {
	var table *C.struct_hone_feature
	n := int(C.hone_features(&table))
	list := make([]Feature, n)
	for i, f := range unsafe.Slice(table, n) {
		list[i] = Feature{C.GoString(f.name), f.built != 0, C.hone_cpu_has(&f) != 0}
	}
	return list
}

// HasOpenMP reports whether the engine was built with OpenMP, whose threads sleep at barriers where ggml's own spin.
func HasOpenMP() bool { return C.hone_built_with_openmp() != 0 }

// HasRepack reports whether the engine was built with the repacked matrix kernels of 4-bit weights.
func HasRepack() bool { return C.hone_built_with_repack() != 0 }
