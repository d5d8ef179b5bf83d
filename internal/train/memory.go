package train

import (
	"errors"
	"fmt"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/memory"
)

// setting is a combination of what decides the memory of a job.
type setting struct {
	layout      string // of graph.LayoutNames
	microTokens int
	recompute   bool
}

// settings are what auto tries, the fastest first. They differ in nothing but memory and speed. On a GPU, low is middle in
// small micro-batches whose activations are computed twice, for those who ask for it.
func settings(o child.TrainOptions, gpu bool) []setting {
	sizes, layouts := []int{1024, 512, 256}, graph.LayoutNames
	low := gpu && or(o.Memory, "auto") == "low"
	if gpu {
		sizes, layouts = []int{4096, 2048, 1024, 512}, []string{"exact", "middle"}
	}
	if low {
		sizes = []int{1024, 512, 256}
	}
	if name := or(o.Memory, "auto"); name != "auto" {
		layouts = []string{name}
	}
	if o.MicroBatchTokens != nil {
		sizes = []int{*o.MicroBatchTokens}
	}
	var all []setting
	last := layouts[len(layouts)-1]
	for _, name := range layouts {
		for _, n := range sizes {
			// The next layout of a CPU costs a tenth of the speed, and half the micro-batch a quarter.
			if (gpu || n == sizes[0] || name == last) && !low {
				all = append(all, setting{name, n, false})
			}
		}
		if gpu || name == last {
			for _, n := range sizes {
				all = append(all, setting{name, n, true})
			}
		}
	}
	return all
}

// planMemory opens the device, chooses the layout of the weights and the size of the micro-batches by the free memory,
// and reports them, or refuses with the numbers. A resumed job keeps what it had.
func (t *trainer) planMemory(file *gguf.File, decide bool) error {
	if err := t.openBackend(decide); err != nil {
		return err
	}
	if !decide {
		return t.emit(child.TrainerEvent{Type: child.EventMemory, Memory: &t.plan.Memory})
	}
	plan, err := t.chooseMemory(file)
	var refused *child.Error
	if device, gpu := t.backend.Device(); gpu && errors.As(err, &refused) && or(t.config.Options.Device, "auto") == "auto" {
		if err := t.warn("Training on the CPU, because %s is too small: %s", device.Description, refused.Message); err != nil {
			return err
		}
		t.backend.Close()
		if t.backend, err = ggml.NewCPU(t.threads); err != nil {
			return err
		}
		plan, err = t.chooseMemory(file)
	}
	if err != nil {
		return err
	}
	t.plan.Memory = plan
	return t.emit(child.TrainerEvent{Type: child.EventMemory, Memory: &plan})
}

func (t *trainer) chooseMemory(file *gguf.File) (child.MemoryPlan, error) {
	free, err := t.freeMemory()
	if err != nil {
		return child.MemoryPlan{}, err
	}
	_, gpu := t.backend.Device()
	var first, least child.MemoryPlan
	for i, s := range settings(t.config.Options, gpu) {
		p, err := t.estimate(file, s)
		if err != nil {
			return p, err
		}
		p.FreeBytes = free
		if i == 0 {
			first, least = p, p
		}
		if p.TotalBytes <= free {
			if i > 0 {
				err = t.warnOfPlan(first, p)
			}
			return p, err
		}
		if p.TotalBytes < least.TotalBytes {
			least = p
		}
	}
	return least, t.refuseMemory(file, least)
}

func describePlan(p child.MemoryPlan) string {
	text := fmt.Sprintf("memory %s with micro-batches of %d tokens", p.Layout, p.MicroBatchTokens)
	if p.Recompute {
		text += " whose activations are computed twice"
	}
	return text
}

func (t *trainer) warnOfPlan(wanted, p child.MemoryPlan) error {
	return t.warn("Training with %s, in %d MiB: %s takes %d MiB and %d MiB are free",
		describePlan(p), p.TotalBytes>>20, describePlan(wanted), wanted.TotalBytes>>20, wanted.FreeBytes>>20)
}

// refuseMemory says what the job would take at least, and what would fit.
func (t *trainer) refuseMemory(file *gguf.File, least child.MemoryPlan) error {
	advice := "free some memory, or take a smaller base model"
	for _, s := range []setting{{"middle", 512, false}, {"low", 1024, true}, {"low", 512, true}, {"low", 256, true}, {"low", 64, true}} {
		p, err := t.estimate(file, s)
		if err != nil {
			return err
		}
		if p.TotalBytes <= least.FreeBytes {
			advice = fmt.Sprintf("%q as memory with %d as micro_batch_tokens would fit, in %d MiB", s.layout, s.microTokens, p.TotalBytes>>20)
			break
		}
	}
	return &child.Error{
		Code: child.CodeInsufficientMemory,
		Message: fmt.Sprintf("training this model takes %d MiB (weights %d, adapter %d, activations %d, the rest %d) and %d MiB are free: %s",
			least.TotalBytes>>20, least.WeightBytes>>20, least.AdapterBytes>>20, least.ActivationBytes>>20, least.OverheadBytes>>20, least.FreeBytes>>20, advice),
		Param: "model",
	}
}

// gpuOverhead is what a GPU's runtime takes beside our tensors, in bytes: its context, code and workspaces, and ggml's
// pools. It follows the size of the matrices, as measured with CUDA 13 on an H100: docs/gpu.md.
func gpuOverhead(s graph.Shape) int64 { return 640<<20 + 11*int64(s.Embedding)*int64(s.FeedForward) }

// estimate is what a job takes at its peak. On the CPU that is with the process as it is now, the optimizer's moments and
// the pages that stay in the model file; on a GPU, of its memory alone.
func (t *trainer) estimate(file *gguf.File, s setting) (child.MemoryPlan, error) {
	options, err := loraOptions(t.plan)
	if err != nil {
		return child.MemoryPlan{}, optionFailure(err)
	}
	device, gpu := t.backend.Device()
	layout, err := graph.LayoutOf(s.layout, gpu)
	if err != nil {
		return child.MemoryPlan{}, err
	}
	tokens, err := t.largestMicro(s.microTokens)
	if err != nil {
		return child.MemoryPlan{}, err
	}
	m, err := graph.Estimate(file, t.backend, layout, options, s.recompute, t.worstBatch(tokens))
	if err != nil {
		var unsupported *graph.UnsupportedError
		if errors.As(err, &unsupported) {
			err = &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
		}
		return child.MemoryPlan{}, err
	}
	forward, backward, _ := strings.Cut(layout.String(), "/")
	p := child.MemoryPlan{
		Device: "cpu", Layout: s.layout, Forward: forward, Backward: backward, MicroBatchTokens: s.microTokens, Recompute: s.recompute,
		WeightBytes: int64(m.Weights), AdapterBytes: int64(m.Adapter), ActivationBytes: int64(m.Activations),
	}
	if gpu {
		shape, err := graph.ReadShape(file)
		if err != nil {
			return p, err
		}
		p.Device, p.OverheadBytes = device.Description, gpuOverhead(shape)
	} else {
		now, err := memory.Resident()
		if err != nil {
			return p, err
		}
		p.AdapterBytes *= 2 // weights and gradients, and two moments
		p.OverheadBytes = now + int64(m.Mapped)
	}
	p.TotalBytes = p.WeightBytes + p.AdapterBytes + p.ActivationBytes + p.OverheadBytes
	return p, nil
}

// reserve takes the memory of the largest micro-batch at once. Where that fails, the micro-batches themselves find out
// what there is.
func (t *trainer) reserve() error {
	tokens, err := t.largestMicro(t.plan.Memory.MicroBatchTokens)
	if err != nil {
		return err
	}
	if err := t.model.Reserve(t.worstBatch(tokens), t.lora); err != nil && !errors.Is(err, ggml.ErrMemory) {
		return err
	}
	return nil
}

func (t *trainer) worstBatch(tokens int) engine.Batch {
	return graph.WorstBatch(tokens, min(tokens, t.data.Longest), tokens)
}

// largestMicro is the most tokens of a micro-batch in a sample of the first epoch's steps, taken evenly: small steps of
// short rows, which may share their beginnings, do not fill one.
func (t *trainer) largestMicro(microTokens int) (int, error) {
	const sample = 2000 // examples
	n := t.plan.BatchSize
	batches := stepsPerEpoch(t.data.Rows, n)
	every := max(1, batches*n/sample)
	order, largest := t.data.Order(t.plan.Seed, 0), 0
	for i := 0; i < batches; i += every {
		examples, err := t.data.Examples(order, i*n, (i+1)*n)
		if err != nil {
			return 0, err
		}
		for _, m := range dataset.Pack(examples, microTokens, t.plan.PrefixSharing) {
			largest = max(largest, len(m.Batch.Tokens))
		}
	}
	return largest, nil
}

// freeMemory is what training may take in all, in bytes: on the CPU what is free and what this process has already, on a
// GPU what is free there, and never more than the server granted.
func (t *trainer) freeMemory() (int64, error) {
	var free int64
	if device, gpu := t.backend.Device(); gpu {
		free = int64(device.FreeBytes)
	} else {
		available, group, err := memory.Free()
		if err != nil {
			return 0, err
		}
		own, err := memory.Resident()
		if err != nil {
			return 0, err
		}
		free = own + min(available, group)
		if granted := t.config.HostMemoryBytes; granted > 0 {
			free = min(free, granted)
		}
	}
	if granted := t.config.MemoryBytes; granted > 0 {
		free = min(free, granted)
	}
	return free, nil
}
