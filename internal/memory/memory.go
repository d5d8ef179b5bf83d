// Package memory says what memory this machine has left and what processes take of it.
//
//	machine, group, err := memory.Free()
//	room := min(machine, group)
package memory

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// Free is what can be allocated on this machine without swapping, by the kernel's estimate, and what the control groups
// of this process leave of it, in bytes; math.MaxInt64 is no limit. The lesser of the two can be had.
func Free() (machine, group int64, err error) {
	machine, err = kibibytes("/proc/meminfo", "MemAvailable:")
	return machine, controlGroups("/proc/self/cgroup", "/sys/fs/cgroup"), err
}

// Resident is what this process holds in memory, and Peak the most that it has held, in bytes, mapped files among it.
func Resident() (int64, error) { return kibibytes("/proc/self/status", "VmRSS:") }

// Peak is the most that Resident has been.
func Peak() (int64, error) { return kibibytes("/proc/self/status", "VmHWM:") }

// Of is what another process holds in memory, in bytes: its own, and pages of files, which the kernel drops when memory is
// short and Free counts as free.
func Of(pid int) (own, files int64, err error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	if own, err = kibibytes(path, "RssAnon:"); err != nil {
		return 0, 0, err
	}
	files, err = kibibytes(path, "RssFile:")
	return own, files, err
}

// kibibytes reads a line such as "VmRSS: 123 kB".
func kibibytes(path, key string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("memory: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("memory: %s: %w", path, err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("memory: " + path + " has no " + key)
}

// controlGroups is what the control groups of this process leave it, in bytes: the least limit of its group and those
// above, minus what is in use there and cannot be dropped. math.MaxInt64 is no limit.
//
// Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1 has its hierarchy of memory under memory/.
func controlGroups(membership, root string) int64 {
	f, err := os.Open(membership)
	if err != nil {
		return math.MaxInt64
	}
	defer f.Close()
	free := int64(math.MaxInt64)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		_, rest, _ := strings.Cut(lines.Text(), ":")
		controllers, group, _ := strings.Cut(rest, ":")
		base, limit, usage, cache := root, "memory.max", "memory.current", "inactive_file "
		if controllers != "" {
			if controllers != "memory" {
				continue
			}
			base, limit, usage, cache = filepath.Join(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "
		}
		// In a container, the path may be that of the host, and the root is the group itself: then only the root is found.
		for group = path.Clean("/" + group); ; group = path.Dir(group) {
			free = min(free, groupFree(filepath.Join(base, group), limit, usage, cache))
			if group == "/" {
				break
			}
		}
	}
	return free
}

func groupFree(dir, limit, usage, cache string) int64 {
	number := func(name string) (int64, bool) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return 0, false
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		return n, err == nil // "max" is none
	}
	most, ok := number(limit)
	if !ok {
		return math.MaxInt64
	}
	used, ok := number(usage)
	if !ok {
		return math.MaxInt64
	}
	if stat, err := os.ReadFile(filepath.Join(dir, "memory.stat")); err == nil {
		for line := range strings.Lines(string(stat)) {
			if rest, ok := strings.CutPrefix(line, cache); ok {
				if n, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64); err == nil {
					used -= n // pages of files that are dropped when memory is short
				}
			}
		}
	}
	return max(0, most-used)
}
