package train

// FreeMemory is what can be allocated on this machine without swapping, and what the control groups of this process
// leave of it, in bytes; math.MaxInt64 is no limit. A job on the CPU may take the lesser of the two.
func FreeMemory() (machine, group int64, err error) {
	machine, err = availableMemory()
	return machine, groupMemory("/proc/self/cgroup", "/sys/fs/cgroup"), err
}
