package memory

import (
	"math"
	"os"
	"path/filepath"
	"testing"
)

func TestFree(t *testing.T) {
	machine, group, err := Free()
	if err != nil || machine <= 0 || group <= 0 {
		t.Errorf("%d bytes on the machine, %d in the group, %v", machine, group, err)
	}
	own, files, err := Of(os.Getpid())
	if err != nil || own <= 0 || files <= 0 {
		t.Errorf("this process has %d bytes, and %d of files, %v", own, files, err)
	}
	if resident, err := Resident(); err != nil || resident < own/2 {
		t.Errorf("this process holds %d bytes, %v; its own are %d", resident, err, own)
	}
	if _, _, err := Of(1 << 30); err == nil {
		t.Error("a process that there is not holds memory")
	}
}

func TestControlGroups(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("two", "0::/a/b\n")
	write("one", "5:cpu:/x\n4:memory:/a\n")
	write("none", "0::/other\n")
	write("a/memory.max", "1000\n")
	write("a/memory.current", "700\n")
	write("a/memory.stat", "anon 500\ninactive_file 200\n")
	write("a/b/memory.max", "max\n")
	write("a/b/memory.current", "600\n")
	write("memory/a/memory.limit_in_bytes", "5000\n")
	write("memory/a/memory.usage_in_bytes", "4000\n")
	write("memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n")
	for name, want := range map[string]int64{"two": 500, "one": 1500, "none": math.MaxInt64, "missing": math.MaxInt64} {
		if got := controlGroups(filepath.Join(root, name), root); got != want {
			t.Errorf("%s: %d bytes, expected %d", name, got, want)
		}
	}
}
