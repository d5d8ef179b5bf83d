package ggml

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// The operations of serving, built for plain C, for AVX2 and for this machine, against double loops.
func TestPagedInstructionSets(t *testing.T) {
	t.Parallel()
	compiler := os.Getenv("CC")
	if compiler == "" {
		compiler = "cc"
	}
	targets := []string{"native"}
	if runtime.GOARCH == "amd64" {
		targets = append(targets, "x86-64", "x86-64-v3")
	}
	for i, target := range targets {
		program := filepath.Join(t.TempDir(), fmt.Sprint("paged", i))
		args := []string{"-O2", "-march=" + target, "testdata/paged_main.c", "-o", program, "-lm"}
		if out, err := exec.CommandContext(t.Context(), compiler, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		out, err := exec.CommandContext(t.Context(), program).CombinedOutput()
		if err != nil && target == "x86-64-v3" && !HasVNNI() {
			continue // a processor without AVX2
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", target, err, out)
		}
	}
}

// TestCrew runs short programs many times, with waits between that let the threads fall asleep, with more threads than there
// are cores. Each node needs the result of the one before.
func TestCrew(t *testing.T) {
	t.Parallel()
	const width, rows, nodes = 16, 23, 40
	for _, threads := range []int{1, 2, 5} {
		crew, err := NewCrew(threads)
		if err != nil {
			t.Fatal(err)
		}
		defer crew.Close()
		x := NewContext(3*nodes+8, 0)
		defer x.Free()
		memory := NewContext(nodes+2, 0)
		defer memory.Free()
		backend, err := NewCPU(1)
		if err != nil {
			t.Fatal(err)
		}
		defer backend.Close()
		slots := make([]Tensor, nodes+1)
		for i := range slots {
			slots[i] = memory.New(F32, width, rows)
		}
		index := memory.New(I32, rows)
		buffer, err := memory.Allocate(backend)
		if err != nil {
			t.Fatal(err)
		}
		defer buffer.Free()
		turn := make([]int32, rows)
		for i := range turn {
			turn[i] = int32((i + 1) % rows)
		}
		index.SetInts(turn)
		var program Program
		for i := range nodes {
			node := x.PickRows(slots[i], index)
			node.ShareMemory(slots[i+1])
			program.Add(node, "pick", 1+i%7*3)
		}
		for round := range 3000 {
			if round%500 == 0 {
				time.Sleep(time.Millisecond)
			}
			values := slots[0].Floats()
			for i := range values {
				values[i] = float32(i/width*10000 + round)
			}
			if err := crew.Run(&program); err != nil {
				t.Fatal(err)
			}
			for i, v := range slots[nodes].Floats() {
				if want := float32((i/width+nodes)%rows*10000 + round); v != want {
					t.Fatalf("%d threads, round %d: element %d is %g, expected %g", threads, round, i, v, want)
				}
			}
		}
		crew.Stop(true)
		if err := crew.Run(&program); !errors.Is(err, ErrAborted) {
			t.Fatalf("%v, expected ErrAborted", err)
		}
		crew.Stop(false)
		if err := crew.Run(&program); err != nil {
			t.Fatal(err)
		}
	}
}
