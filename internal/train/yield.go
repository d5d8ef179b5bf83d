package train

import (
	"errors"
	"fmt"
	"os"
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
	// loadInterval is the shortest time to take an average over: the kernel counts in hundredths of a second.
	loadInterval = 200 * time.Millisecond
)

// yield is called before every micro-batch. It computes on one thread while other processes use the processor. The
// results are the same with any number.
func (t *trainer) yield() {
	if t.threads <= 1 {
		return
	}
	others, ok := t.neighbours.cores()
	if !ok {
		return
	}
	threads := t.threads
	if others > busyCores {
		threads = 1
	}
	t.backend.SetThreads(threads)
}

// neighbours follows what other processes use of the processor.
type neighbours struct {
	at   time.Time
	used time.Duration // by all processes but this one, since the machine started
}

// cores is how many cores other processes have used on average since the last time it was asked; false if that is too
// short ago or not known.
func (l *neighbours) cores() (float64, bool) {
	now := time.Now()
	if now.Sub(l.at) < loadInterval {
		return 0, false
	}
	used, err := othersUsed()
	if err != nil {
		return 0, false // such as outside of Linux
	}
	cores, known := (used-l.used).Seconds()/now.Sub(l.at).Seconds(), !l.at.IsZero()
	l.at, l.used = now, used
	return cores, known
}

// othersUsed is the time of all processes but this one, proc(5).
func othersUsed() (time.Duration, error) {
	const perSecond = 100 // USER_HZ, which is 100 on every architecture that we build for
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
