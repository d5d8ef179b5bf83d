// Package doctor examines the machine that hone runs on: what is there, what is used and why not, and how to mend it.
//
//	checks := doctor.Run(ctx, doctor.Options{DataDir: cfg.DataDir, Host: cfg.Host, Port: cfg.Port, Engine: probe, ...})
//	for _, c := range checks { fmt.Println(c.Status, c.Name, c.Found, c.Fix) }
//
// It changes nothing but for a file that it makes in the data directory and removes. The engine is not linked here: what it
// has to say comes from Options.Engine, which asks a process that may crash.
package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hone-llm/hone/internal/models"
)

// Status is the result of a check.
type Status string

// The statuses, from good to bad.
const (
	OK      Status = "ok"
	Warning Status = "warning" // it works, but slower or with less than there could be
	Problem Status = "problem" // something will fail
)

// Check is what one look has found.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Found  string `json:"found"`
	Fix    string `json:"fix,omitempty"` // what to do; empty where the status is OK
}

// Worst is the worst status of the checks.
func Worst(checks []Check) Status {
	worst := OK
	for _, c := range checks {
		if c.Status == Problem || worst == OK {
			worst = c.Status
		}
	}
	return worst
}

// Options say what to examine: configuration, and what only the engine and its process know.
type Options struct {
	DataDir       string // absolute
	Host          string
	Port          int    // 0: any free one
	Key           string // of the API, to be told about the server's models; "": none
	CertFile      string // of the server's TLS certificate; "": plain HTTP
	DefaultModel  string // "": none
	Device        string // of answers: auto, cpu, cuda
	TrainerDevice string // of jobs that do not say
	Memory        int64  // that models and jobs may take together, in bytes; 0: automatic
	TrainerMemory int64  // that a job may take, in bytes; 0: what is free
	Threads       int    // 0: one for each core

	Cores      int   // that this process may run on
	Quota      int   // processors' worth of time that its control group gives it, at most Cores
	FreeMemory int64 // without swapping, in bytes
	GroupFree  int64 // what the control groups leave, in bytes; math.MaxInt64: no limit
	MemoryErr  error // why FreeMemory is not known

	Engine func(context.Context) (Engine, error)
	Cache  *models.Cache // where models come from; nil with CacheErr
	// CacheErr is what is wrong with the settings of the cache.
	CacheErr error

	Root string // of the files of the system; "": /
}

// Engine is what the engine's process says about itself.
type Engine struct {
	Features []Feature `json:"features"`
	OpenMP   bool      `json:"openmp"`
	Repack   bool      `json:"repack"` // kernels of its own for repacked 4-bit weights
	Layout   string    `json:"layout"` // of the weights in jobs on the CPU, as graph.Layout.String
	Library  string    `json:"library"`

	GPUs   []GPU  `json:"gpus"`
	NoGPU  string `json:"no_gpu"` // why there are none
	Looked bool   `json:"looked"` // for GPUs: a driver can end the process, or keep it waiting
}

// Feature is an extension of the instruction set, by its name in /proc/cpuinfo.
type Feature struct {
	Name  string `json:"name"`
	Built bool   `json:"built"` // the engine was compiled for it
}

// GPU is a device that the engine computes on.
type GPU struct {
	Name        string `json:"name"`
	FreeBytes   int64  `json:"free_bytes"`
	MemoryBytes int64  `json:"memory_bytes"`
}

// Run makes all checks, in the order to read them. Cancelling ctx ends it soon, with errors as findings.
func Run(ctx context.Context, o Options) []Check {
	if o.Root == "" {
		o.Root = "/"
	}
	// What waits for others, at the same time.
	var engine Engine
	var engineErr error
	var hub, pip Check
	var model modelState
	var hubOK, pipOK bool
	var waiting sync.WaitGroup
	waiting.Go(func() { engine, engineErr = o.Engine(ctx) })
	waiting.Go(func() { hub, hubOK = o.hub(ctx) })
	waiting.Go(func() { pip, pipOK = o.pip(ctx) })
	waiting.Go(func() { model = o.lookForModel(ctx) })
	waiting.Wait()
	if hubOK && !pipOK { // nothing needs it
		pip = Check{"pip", OK, "none; it is needed only where the hub cannot be reached", ""}
	}
	if !hubOK && pipOK && model.source.Package != "" {
		hub.Fix += ". The default model comes with pip"
	}
	cpu := readCPU(o.path("proc/cpuinfo"))
	data, holder := o.dataDirectory()
	return []Check{
		o.processor(cpu), engineCheck(cpu, engine, engineErr), layoutCheck(cpu, engine, engineErr),
		o.gpu(engine, engineErr), o.answers(engine, model), o.jobs(engine),
		o.memory(model, holder), o.disk(),
		data, o.server(ctx, holder),
		model.check(hubOK, pipOK), hub, pip,
	}
}

func (o *Options) path(name string) string { return filepath.Join(o.Root, name) }

func (o *Options) exists(name string) bool {
	_, err := os.Stat(o.path(name))
	return err == nil
}

// oneLine is an error's text without line breaks.
func oneLine(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
}
