package child

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"sync"
)

// TrainerOptions says how to start a trainer.
type TrainerOptions struct {
	Exe    string   // "": this binary
	Args   []string // nil: trainer
	Env    []string
	Config TrainerConfig
	Stderr io.Writer
	Logger *slog.Logger // nil drops the log
	// Grant is what it may take of the memory, nil if that has no bound: told to the trainer, made what its plan takes, and
	// released when it has ended or could not be started.
	Grant *Grant
}

// trainerNice lets requests that are answered meanwhile go first; so does waiting asleep at the barriers of the
// engine's threads (OMP_WAIT_POLICY), which costs a trainer nothing: its operations are long.
const trainerNice = 10

// Trainer is a started trainer: one attempt at a job. Its methods may be called from several goroutines.
type Trainer struct {
	process *Process
	events  chan TrainerEvent
	killed  chan struct{}
	once    sync.Once
	grant   *Grant // nil: none
}

// StartTrainer starts a trainer, which runs until it is done, Stop or Kill. The caller reads Events to its end, or
// calls Kill, and then calls Wait.
func StartTrainer(opts TrainerOptions) (*Trainer, error) {
	if opts.Args == nil {
		opts.Args = []string{"trainer"}
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Grant != nil {
		opts.Config.HostMemoryBytes = opts.Grant.Bytes()
	}
	process, err := Start(context.Background(), Options{
		Exe: opts.Exe, Args: opts.Args, Env: append([]string{"OMP_WAIT_POLICY=passive"}, opts.Env...), Config: opts.Config, Stderr: opts.Stderr, Nice: trainerNice,
	})
	if err != nil {
		if opts.Grant != nil {
			opts.Grant.Release()
		}
		return nil, err
	}
	t := &Trainer{process: process, events: make(chan TrainerEvent, 64), killed: make(chan struct{}), grant: opts.Grant}
	if t.grant != nil {
		t.grant.Use(process.PID())
	}
	go t.read(opts.Logger.With("job_id", opts.Config.JobID, "attempt", opts.Config.Attempt))
	return t, nil
}

func (t *Trainer) read(log *slog.Logger) {
	defer close(t.events)
	defer t.process.out.Close()
	for {
		line, err := t.process.Next()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				log.Error("read the trainer's events", "error", err)
				t.Kill() // it could not be followed, nor go on writing into a pipe that nobody reads
			}
			return
		}
		var event TrainerEvent
		if err := json.Unmarshal(line, &event); err != nil {
			log.Warn("a line of the trainer is no event", "error", err, "line", string(line[:min(len(line), 200)]))
			continue
		}
		t.plan(event)
		select {
		case t.events <- event:
		case <-t.killed:
			// Whoever killed it may not read any more; what is left in the pipe is of no interest.
			return
		}
	}
}

// plan makes the grant what the trainer has planned. On a GPU it takes of the machine's memory what every process takes.
func (t *Trainer) plan(e TrainerEvent) {
	memory := e.Memory
	if e.Plan != nil {
		memory = &e.Plan.Memory
	}
	switch {
	case memory == nil || t.grant == nil:
	case memory.Device == "" || memory.Device == "cpu":
		t.grant.Resize(memory.TotalBytes)
	default:
		t.grant.Resize(memory.OverheadBytes)
	}
}

// PID returns the trainer's process id.
func (t *Trainer) PID() int { return t.process.PID() }

// Events carries what the trainer reports; it is closed when its output ends.
func (t *Trainer) Events() <-chan TrainerEvent { return t.events }

// Stop asks the trainer to save a resume state and end. It does not wait.
func (t *Trainer) Stop() error { return t.process.Send(TrainerCommand{Op: "stop"}) }

// Kill ends the trainer at once. It may be called at any time, and again.
func (t *Trainer) Kill() {
	t.once.Do(func() { close(t.killed) })
	_ = t.process.Kill() // Wait says how it ended
}

// Wait returns when the trainer has ended: nil for exit code 0, else mostly an *ExitError.
func (t *Trainer) Wait() error {
	err := t.process.Wait()
	// The reader ends by itself: with nothing left that writes, the pipe has an end.
	t.process.closeInput()
	if t.grant != nil {
		t.grant.Release()
	}
	return err
}
