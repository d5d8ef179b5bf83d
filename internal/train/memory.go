package train

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

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/graph"
)

// layouts are the values of the memory option, the most exact first. Auto takes the first that fits of those that it
// may choose, and says so if that is not the first.
var layouts = []struct {
	name   string
	layout func() graph.Layout
}{
	{"exact", graph.ExactLayout},
	{"middle", graph.SmallLayout},
}

// autoMicroTokens are the sizes of a micro-batch that auto tries with each layout: the results differ by rounding only.
var autoMicroTokens = []int{defaultMicroTokens, 512, 256}

// planMemory chooses the layout of the weights and the size of the micro-batches by the free memory, and reports them, or
// refuses with the numbers. A resumed job keeps what it had.
func (t *trainer) planMemory(shape graph.Shape, fileBytes int64, decide bool) error {
	if !decide {
		return t.emit(child.TrainerEvent{Type: child.EventMemory, Memory: &t.plan.Memory})
	}
	free, err := t.freeMemory()
	if err != nil {
		return err
	}
	plans, err := t.memoryPlans(shape, fileBytes, free)
	if err != nil {
		return err
	}
	for i, p := range plans {
		if p.TotalBytes > p.FreeBytes {
			continue
		}
		t.plan.Memory = p
		if i > 0 {
			if err := t.warnOfPlan(plans[0], p); err != nil {
				return err
			}
		}
		return t.emit(child.TrainerEvent{Type: child.EventMemory, Memory: &p})
	}
	return t.refuseMemory(shape, fileBytes, plans)
}

func (t *trainer) warnOfPlan(wanted, p child.MemoryPlan) error {
	exactness := ""
	if p.Layout != wanted.Layout {
		exactness = fmt.Sprintf(" and the layout %s, whose gradients are less exact", p.Layout)
	}
	return t.warn("The layout %s with micro-batches of %d tokens takes %d MiB and %d MiB are free: training with micro-batches of %d tokens%s, in %d MiB",
		wanted.Layout, wanted.MicroBatchTokens, wanted.TotalBytes>>20, wanted.FreeBytes>>20, p.MicroBatchTokens, exactness, p.TotalBytes>>20)
}

// memoryPlans are what the options allow, in the order of preference.
func (t *trainer) memoryPlans(shape graph.Shape, fileBytes, free int64) ([]child.MemoryPlan, error) {
	wanted, sizes := or(t.config.Options.Memory, "auto"), autoMicroTokens
	if n := t.config.Options.MicroBatchTokens; n != nil {
		sizes = []int{*n}
	}
	var plans []child.MemoryPlan
	for _, l := range layouts {
		if wanted != "auto" && wanted != l.name {
			continue
		}
		for _, n := range sizes {
			p, err := t.estimate(shape, l.name, l.layout(), n, fileBytes)
			if err != nil {
				return nil, err
			}
			p.FreeBytes = free
			plans = append(plans, p)
		}
	}
	return plans, nil
}

// refuseMemory says what the job would take, and what would fit.
func (t *trainer) refuseMemory(shape graph.Shape, fileBytes int64, plans []child.MemoryPlan) error {
	free, least := plans[0].FreeBytes, plans[0]
	for _, p := range plans {
		if p.TotalBytes < least.TotalBytes {
			least = p
		}
	}
	advice := "free some memory or take a smaller base model"
search:
	for _, n := range append(autoMicroTokens, 128, 64) {
		for _, l := range layouts {
			p, err := t.estimate(shape, l.name, l.layout(), n, fileBytes)
			if err != nil {
				return err
			}
			if p.TotalBytes <= free {
				advice = fmt.Sprintf("memory %q with micro_batch_tokens %d would fit, in %d MiB", l.name, n, p.TotalBytes>>20)
				break search
			}
		}
	}
	return &child.Error{
		Code: child.CodeInsufficientMemory,
		Message: fmt.Sprintf("training this model takes %d MiB (weights %d, adapter %d, activations %d, the rest %d) and %d MiB are free: %s",
			least.TotalBytes>>20, least.WeightBytes>>20, least.AdapterBytes>>20, least.ActivationBytes>>20, least.OverheadBytes>>20, free>>20, advice),
		Param: "model",
	}
}

// estimate is what a job takes at its peak: the process as it is now, the weights and the adapter, and either the pages of
// the model file, while the weights are read, or the activations of the largest micro-batch.
func (t *trainer) estimate(shape graph.Shape, name string, layout graph.Layout, microTokens int, fileBytes int64) (child.MemoryPlan, error) {
	options, err := loraOptions(t.plan)
	if err != nil {
		return child.MemoryPlan{}, optionFailure(err)
	}
	forward, backward, _ := strings.Cut(layout.String(), "/")
	tokens := max(microTokens, t.longestExample())
	p := child.MemoryPlan{
		Device: "cpu", Layout: name, Forward: forward, Backward: backward, MicroBatchTokens: microTokens,
		WeightBytes:     int64(shape.WeightBytes(layout)),
		AdapterBytes:    int64(16 * adapterWeights(shape, options)), // weights, gradients and two moments
		ActivationBytes: int64(tokens * shape.TokenBytes(t.plan.R)),
	}
	now, err := residentMemory()
	if err != nil {
		return p, err
	}
	p.OverheadBytes = now + max(0, fileBytes-p.AdapterBytes-p.ActivationBytes)
	p.TotalBytes = p.WeightBytes + p.AdapterBytes + p.ActivationBytes + p.OverheadBytes
	return p, nil
}

// adapterWeights is the length of graph.LoRA.Parameters.
func adapterWeights(s graph.Shape, o graph.LoRAOptions) int {
	d, q, kv := s.Embedding, s.Heads.Query*s.Heads.Size, s.Heads.KeyValue*s.Heads.Size
	sizes := map[graph.Module]int{
		graph.Query: d + q, graph.Key: d + kv, graph.Value: d + kv, graph.Output: q + d,
		graph.Gate: d + s.FeedForward, graph.Up: d + s.FeedForward, graph.Down: s.FeedForward + d,
	}
	layers, rank := s.Layers, (o.Rank+15)/16*16
	if len(o.Layers) > 0 {
		layers = len(o.Layers)
	}
	n := 0
	for _, m := range o.Modules {
		n += layers * rank * sizes[m]
	}
	return n
}

// longestExample bounds the tokens of an example in a micro-batch; its answers are never in two.
func (t *trainer) longestExample() int {
	longest := t.data.Longest
	if t.valid != nil {
		longest = max(longest, t.valid.Longest)
	}
	if t.plan.Method == methodDPO {
		longest *= 2
	}
	return longest
}

// freeMemory is what this process may take in all, in bytes: what the server granted, or else what is free and what it
// has already.
func (t *trainer) freeMemory() (int64, error) {
	free, err := availableMemory()
	if err != nil {
		return 0, err
	}
	free = min(free, groupMemory("/proc/self/cgroup", "/sys/fs/cgroup"))
	own, err := residentMemory()
	if err != nil {
		return 0, err
	}
	free += own
	if granted := t.config.MemoryBytes; granted > 0 {
		free = min(free, granted)
	}
	return free, nil
}

// availableMemory is the kernel's estimate of what can be allocated without swapping, in bytes.
func availableMemory() (int64, error) { return kibibytes("/proc/meminfo", "MemAvailable:") }

// residentMemory is what this process holds in memory, and peakMemory the most that it has held, in bytes.
func residentMemory() (int64, error) { return kibibytes("/proc/self/status", "VmRSS:") }
func peakMemory() (int64, error)     { return kibibytes("/proc/self/status", "VmHWM:") }

// kibibytes reads a line such as "VmRSS: 123 kB".
func kibibytes(path, key string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("free memory: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("free memory: %s: %w", path, err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("free memory: " + path + " has no " + key)
}

// groupMemory is what the control groups of this process leave it, in bytes: the least limit of its group and those
// above, minus what is in use there and cannot be dropped. math.MaxInt64 is no limit.
//
// Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1 has its hierarchy of memory under memory/.
func groupMemory(membership, root string) int64 {
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
