package doctor

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/dustin/go-humanize/english"
	"github.com/hone-llm/hone/internal/child"
)

// cpu is what /proc/cpuinfo says of the first processor.
type cpu struct {
	model string
	flags []string // none if the file could not be read
}

func readCPU(path string) cpu {
	var c cpu
	data, err := os.ReadFile(path)
	if err != nil {
		return c
	}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			c.model = strings.TrimSpace(value)
		case "flags", "Features":
			c.flags = strings.Fields(value)
		}
		if c.flags != nil {
			break
		}
	}
	return c
}

func (o *Options) processor(c cpu) Check {
	check := Check{Name: "processor", Status: OK, Found: english.Plural(o.Cores, "core", "")}
	if c.model != "" {
		check.Found = c.model + ", " + check.Found
	}
	threads := o.Threads
	if threads == 0 {
		threads = o.Cores
	}
	if o.Quota > 0 && threads > o.Quota {
		check.Status = Warning
		check.Found += fmt.Sprintf(", of which the control group allows %d at a time, and %d threads would compute", o.Quota, threads)
		check.Fix = fmt.Sprintf("set threads: %d (HONE_THREADS=%[1]d), or give the container more processors", o.Quota)
	}
	return check
}

// used are the extensions that the engine has kernels of its own for, or gains much from, the most important last.
var used = []string{"f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_int8", "asimdhp", "asimddp", "i8mm"}

const rebuild = "build it on this machine: make build (of the container's image: --build-arg HONE_MARCH=native, or what its machines have in common)"

func engineCheck(c cpu, e Engine, err error) Check {
	if len(e.Features) == 0 && err != nil {
		return Check{"engine", Problem, "it ends at its start: " + oneLine(err), rebuild}
	}
	var with, missing, idle []string
	for _, f := range e.Features {
		has := slices.Contains(c.flags, f.Name)
		important := slices.Contains(used, f.Name)
		switch {
		case f.Built && !has && len(c.flags) > 0:
			missing = append(missing, f.Name)
		case f.Built && important:
			with = append(with, f.Name)
		case !f.Built && has && important && f.Name != "amx_int8": // whose tiles are no faster than VNNI for small products
			idle = append(idle, f.Name)
		}
	}
	found := "built for the baseline of its architecture"
	if len(with) > 0 {
		found = "built for " + strings.Join(with, ", ")
	}
	if e.OpenMP {
		found += ", with OpenMP"
	}
	if e.Repack {
		found += ", repacked 4-bit kernels"
	}
	switch {
	case len(missing) > 0:
		return Check{"engine", Problem, "built for " + strings.Join(missing, ", ") + ", which this processor does not have: it may end with an illegal instruction", rebuild}
	case len(idle) > 0:
		return Check{"engine", Warning, found + "; without " + strings.Join(idle, ", ") + ", which this processor has", rebuild}
	case !e.OpenMP:
		return Check{"engine", Warning, found + "; without OpenMP, threads spin while they wait and answers and jobs slow each other down", "build it with `make build`, which sets the flags of scripts/env.sh"}
	case !e.Repack:
		return Check{"engine", Warning, found + "; without the repacked kernels, answers of 4-bit models are slower", "build it with `make build`, which sets the flags of scripts/env.sh"}
	}
	return Check{"engine", OK, found, ""}
}

// layoutCheck says how jobs on the CPU keep the frozen weights.
func layoutCheck(c cpu, e Engine, err error) Check {
	check := Check{Name: "job layout", Status: OK}
	switch {
	case e.Layout == "":
		check.Status, check.Found, check.Fix = Warning, "not known", "see the engine above"
		if err != nil {
			check.Found += ": " + oneLine(err)
		}
	case e.Layout == "packed/packed":
		check.Found = "packed/packed: jobs on the CPU use the integer products of avx512_vnni, the fastest there is"
	default:
		check.Found = e.Layout + ": the general kernels, in more memory"
		if slices.Contains(c.flags, "avx512_vnni") {
			check.Status, check.Fix = Warning, "this processor has avx512_vnni, for which jobs have faster kernels: "+rebuild
		} else {
			check.Found += "; this processor has no avx512_vnni, for which there are faster ones"
		}
	}
	return check
}

// Free memory below which the default model's jobs may be refused, and its answers.
const (
	jobMemory    = 2 << 30
	answerMemory = 512 << 20
)

func size(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

// memory says what is free and what of it the server may use. While one runs, what its models hold is not free.
func (o *Options) memory(m modelState, h holder) Check {
	if o.MemoryErr != nil {
		return Check{"memory", Warning, "not known: " + oneLine(o.MemoryErr), "hone reads /proc/meminfo: is /proc mounted?"}
	}
	check := Check{Name: "memory", Status: OK, Found: size(o.FreeMemory) + " free"}
	if total, ok := meminfo(o.path("proc/meminfo"), "MemTotal:"); ok {
		check.Found += " of " + size(total)
	}
	free := min(o.FreeMemory, o.GroupFree)
	if o.GroupFree < o.FreeMemory { // groups without a limit have one beyond any machine
		check.Found += ", and the control group (a container's limit) leaves " + size(o.GroupFree)
	}
	budget, how := o.Memory, fmt.Sprint("memory: ", o.Memory)
	if budget == 0 {
		budget, how = int64(float64(free)*child.AutoShare), "memory: auto"
	}
	check.Found += fmt.Sprintf("; models and jobs may take %s together (%s)", size(budget), how)
	if h.held && o.Memory == 0 {
		check.Found += " beside what the running server's have"
	}
	if o.TrainerMemory > 0 {
		check.Found += ", of which trainer.memory gives a job " + size(o.TrainerMemory)
	}
	switch {
	case free < answerMemory:
		check.Status = Problem
	case free < jobMemory:
		check.Status = Warning
	case o.Memory > 0 && m.size > o.Memory:
		check.Status, check.Fix = Problem, fmt.Sprintf("raise memory: %s alone has %s", m.name, size(m.size))
		return check
	case o.Memory > free && !h.held:
		check.Status, check.Fix = Warning, "memory is more than is free, so models may fail to load, or the machine swap: lower it, or end other programs"
		return check
	case o.TrainerMemory > free && o.TrainerDevice == "cpu":
		check.Status, check.Fix = Warning, "trainer.memory is more than there is; jobs get what is free"
		return check
	}
	if check.Status != OK {
		check.Fix = "end other programs"
		if free < o.FreeMemory {
			check.Fix = "raise the container's limit (docker run --memory)"
		}
		check.Fix += fmt.Sprintf("; even the smallest models want %s to answer and %s to be tuned", size(answerMemory), size(jobMemory))
	}
	return check
}

func meminfo(path, key string) (bytes int64, ok bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(data)) {
		if rest, found := strings.CutPrefix(line, key); found {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err == nil
		}
	}
	return 0, false
}
