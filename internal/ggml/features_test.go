package ggml

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// TestFeatures compares the bits of CPUID with what the kernel made of them.
func TestFeatures(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		t.Skip("CPUID is of x86-64")
	}
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Skip(err)
	}
	var flags []string
	for line := range strings.Lines(string(data)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "flags" {
			flags = strings.Fields(value)
			break
		}
	}
	features := Features()
	if len(features) < 30 {
		t.Fatalf("%d features", len(features))
	}
	for _, f := range features {
		if f.Has != slices.Contains(flags, f.Name) {
			t.Errorf("%s: CPUID says %t, /proc/cpuinfo %t", f.Name, f.Has, !f.Has)
		}
		if f.Built && !f.Has {
			t.Errorf("%s: this test was built for it, and runs without", f.Name)
		}
	}
	built := func(name string) bool {
		return slices.ContainsFunc(features, func(f Feature) bool { return f.Name == name && f.Built })
	}
	if built("avx512_vnni") != HasVNNI() || built("avx512_bf16") != HasBF16() {
		t.Error("the engine was built with other flags than this package")
	}
}
