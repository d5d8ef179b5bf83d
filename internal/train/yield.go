package train

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// busyCores is how many cores other processes use on average when training steps back to one thread. A computation
	// of two threads waits for the slower one at every operation, and so does a runner whose thread it displaces: one
	// thread beside a busy runner is no slower, and leaves it more.
	busyCores = 0.4
	// rest is how long training sleeps while the server's runners answer, for each second of a micro-batch. A low
	// priority is not enough: both need the cache and the memory's bandwidth. Beside four streams of
	// chat on two cores, training without rest keeps half of its speed and takes 37% of theirs, at niceness 10 as at 19;
	// with it, it keeps a sixth and takes 10%.
	rest = 1.5
	// loadInterval is the shortest time to take an average over: the kernel counts in hundredths of a second.
	loadInterval = 200 * time.Millisecond
)

// yield is called before every micro-batch. It sleeps and computes on one thread while the server that started this
// process answers, and computes on one thread while any other process uses the processor. The results are the same. A GPU
// shares itself out.
func (t *trainer) yield(ctx context.Context) {
	if t.backend.GPU() {
		return
	}
	if t.runners.used == nil {
		t.runners.used, t.neighbours.used = siblingsUsed, othersUsed
	}
	if t.runners.busy() && !t.worked.IsZero() {
		worked := time.Since(t.worked)
		for slept := time.Duration(0); slept.Seconds() < rest*worked.Seconds() && t.runners.busy(); slept += loadInterval {
			select {
			case <-ctx.Done():
				return
			case <-time.After(loadInterval):
			}
		}
	}
	if t.threads > 1 {
		threads := t.threads
		if t.neighbours.busy() {
			threads = 1
		}
		t.backend.SetThreads(threads)
	}
	t.worked = time.Now()
}

// load follows what processes use of the processor.
type load struct {
	used  func() (time.Duration, error) // since a fixed time
	at    time.Time
	then  time.Duration // used at that time
	cores float64       // on average before it
}

// busy reports whether they have used more than busyCores since it was last asked, or, if that is too short ago, before.
// What is not known is not busy, such as outside of Linux.
func (l *load) busy() bool {
	now := time.Now()
	if now.Sub(l.at) < loadInterval {
		return l.cores > busyCores
	}
	used, err := l.used()
	if err != nil {
		return false
	}
	if l.at.IsZero() {
		l.then = used
	}
	l.cores = (used - l.then).Seconds() / now.Sub(l.at).Seconds()
	l.at, l.then = now, used
	return l.cores > busyCores
}

// siblingsUsed is the time of the other children of this process's parent, which are the runners of a server.
func siblingsUsed() (time.Duration, error) { return childrenUsed(os.Getppid(), os.Getpid()) }

// childrenUsed is the time of a process's children but one, proc(5).
func childrenUsed(parent, except int) (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil {
		return 0, err
	}
	ticks := int64(0)
	for _, task := range tasks {
		children, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that has ended meanwhile
		}
		for _, pid := range strings.Fields(string(children)) {
			if pid == strconv.Itoa(except) {
				continue
			}
			stat, err := os.ReadFile("/proc/" + pid + "/stat")
			if err != nil {
				continue
			}
			// pid (name, which may hold anything) state ...: utime and stime are fields 14 and 15.
			fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
			for _, i := range []int{11, 12} {
				if i >= len(fields) {
					continue
				}
				if n, err := strconv.ParseInt(fields[i], 10, 64); err == nil {
					ticks += n
				}
			}
		}
	}
	return time.Duration(ticks) * time.Second / perSecond, nil
}

// perSecond is USER_HZ, which is 100 on every architecture that we build for.
const perSecond = 100

// othersUsed is the time of all processes but this one, proc(5).
func othersUsed() (time.Duration, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(data), "\n")
	fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq ...
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, errors.New("/proc/stat: unexpected format")
	}
	ticks := int64(0)
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += n
	}
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		return 0, err
	}
	return time.Duration(ticks)*time.Second/perSecond - time.Duration(own.Utime.Nano()+own.Stime.Nano()), nil
}
