package finetune_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/store"
)

// The test binary plays three parts: the tests, a trainer that speaks the real protocol and trains nothing, and a server that
// is there to be killed.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("FINETUNE_TEST_TRAINER") != "":
		os.Exit(trainerMain())
	case os.Getenv("FINETUNE_TEST_SERVER") != "":
		os.Exit(serverMain(os.Getenv("FINETUNE_TEST_SERVER")))
	}
	goleak.VerifyTestMain(m)
}

// behaviour is how the trainer of a test behaves; a job's question_template carries it.
type behaviour struct {
	Steps        int           // optimizer steps; two are an epoch, with an evaluation and a resume state at its end
	Delay        time.Duration // of a step
	CrashAt      int           // exit with code 3 in the middle of this step ...
	Crashes      int           // ... in the attempts up to this one
	Fail         string        // report failed with this code instead of training
	Checkpoints  int           // make a checkpoint every second step, and keep so many
	Unreported   bool          // exit with code 3 after writing the first checkpoint, without a word, in the first attempt
	FullAt       int           // find the disk full instead of saving the state of this step, in the first attempt
	AdapterBytes int64         // of the memory plan; 0: 1 MiB
	Deaf         bool          // ignore the stop command and signals
	Silent       bool          // exit with code 0 and no event
	WrongAdapter bool          // write an adapter of another base
}

// options returns options that make the trainer behave so.
func (b behaviour) options() child.TrainOptions {
	data, err := json.Marshal(b)
	if err != nil {
		panic(err)
	}
	text := string(data)
	return child.TrainOptions{QuestionTemplate: &text}
}

// resumeFile holds the step of the fake trainer's resume state.
const resumeFile = "resume.json"

func trainerMain() int {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	if !lines.Scan() {
		return 2
	}
	var config child.TrainerConfig
	var b behaviour
	err := json.Unmarshal(lines.Bytes(), &config)
	if err == nil {
		err = json.Unmarshal([]byte(*config.Options.QuestionTemplate), &b)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(config.Dir, "pid.log"), []byte(strconv.Itoa(os.Getpid())), 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	stop := make(chan struct{})
	go func() {
		for lines.Scan() {
			if !b.Deaf {
				close(stop)
			}
		}
		os.Exit(4) // the parent is gone
	}()
	if b.Deaf {
		signal.Ignore(os.Interrupt, syscall.SIGTERM)
	}
	out := json.NewEncoder(os.Stdout)
	send := func(e child.TrainerEvent) {
		if err := out.Encode(e); err != nil {
			os.Exit(5)
		}
	}
	if b.Silent {
		return 0
	}
	if b.Fail != "" {
		send(child.TrainerEvent{Type: child.EventFailed, Error: &child.Error{Code: b.Fail, Message: "no row fits max_length", Param: "training_file"}})
		return 1
	}
	// What the trainer was told is for the tests to read.
	if data, err := json.Marshal(config); err != nil || os.WriteFile(filepath.Join(config.Dir, "config.log"), data, 0o600) != nil {
		return 6
	}
	dpo := config.Method == finetune.DPO
	step := resumeStep(config.ResumeFrom)
	send(child.TrainerEvent{Type: child.EventDataset, TrainRows: 4, TrainTokens: 40, ValidRows: 1, ValidTokens: 9, DroppedRows: 1, TruncatedRows: 2, SharedTokens: 10,
		LongRows: &child.LongRows{MaxLength: 64, TrainDropped: []int{3}, ValidTruncated: []int{1, 2}}})
	memory := child.MemoryPlan{
		Device: "cpu", Layout: "exact", Forward: "bf16", Backward: "bf16", WeightBytes: 3 << 30, AdapterBytes: 1 << 20, ActivationBytes: 1 << 29,
		OverheadBytes: 1 << 28, TotalBytes: 4 << 30, FreeBytes: 8 << 30, MicroBatchTokens: 1024,
	}
	if b.AdapterBytes > 0 {
		memory.AdapterBytes = b.AdapterBytes
	}
	send(child.TrainerEvent{Type: child.EventMemory, Memory: &memory})
	plan := &child.TrainPlan{
		Method: config.Method, R: 16, NumTrainEpochs: b.Steps / 2, BatchSize: 2, TotalSteps: b.Steps, Seed: config.Seed, ResumedStep: step, LearningRateMultiplier: 1,
		Memory: memory,
	}
	if dpo {
		plan.Beta = 0.1
	}
	send(child.TrainerEvent{Type: child.EventPlan, Plan: plan})
	if config.DryRun {
		send(child.TrainerEvent{Type: child.EventLog, Message: "a note"})
		send(child.TrainerEvent{Type: child.EventDone})
		return 0
	}
	var kept []string
	for step < b.Steps {
		send(child.TrainerEvent{Type: child.EventProgress, Step: step, TotalSteps: b.Steps, Fraction: 0.5, TokensPerSecond: 100, SecondsLeft: 60})
		select {
		case <-stop:
			if err := writeResume(config.Dir, step); err != nil {
				return 6
			}
			send(child.TrainerEvent{Type: child.EventSaved, Step: step})
			return 0
		case <-time.After(b.Delay):
		}
		if step+1 == b.CrashAt && config.Attempt <= b.Crashes {
			return 3
		}
		step++
		done := child.TrainerEvent{
			Type: child.EventStep, Step: step, TotalSteps: b.Steps, TrainLoss: 2 / float64(step), TrainAccuracy: 0.5, TrainedTokens: int64(20 * step),
		}
		eval := child.TrainerEvent{Type: child.EventEval, Step: step, Epoch: step / 2, ValidLoss: 3 / float64(step), ValidAccuracy: 0.25}
		if dpo {
			done.TrainAccuracy, done.ChoiceAccuracy, done.RewardsChosen, done.RewardsRejected = 0, new(0.75), new(0.5), new(-0.5)
			done.LearningRate, done.GradNorm = 1e-3, 2
			eval.ValidAccuracy, eval.ValidChoiceAccuracy, eval.Best = 0, new(0.625), true
		}
		send(done)
		if step%2 == 0 {
			send(eval)
			if b.Checkpoints > 0 {
				dir, id, name := config.Checkpoint(step)
				checkpoint := config
				checkpoint.AdapterDir, checkpoint.AdapterID, checkpoint.AdapterName = dir, id, name
				if err := writeAdapter(checkpoint); err != nil {
					return 7
				}
				if b.Unreported && config.Attempt == 1 {
					return 3
				}
				e := child.TrainerEvent{Type: child.EventCheckpoint, Step: step, CheckpointDir: dir}
				if kept = append(kept, dir); len(kept) > b.Checkpoints {
					e.Removed, kept = kept[:1], kept[1:]
					if err := os.RemoveAll(e.Removed[0]); err != nil {
						return 7
					}
				}
				send(e)
			}
			if step == b.FullAt && config.Attempt == 1 {
				send(child.TrainerEvent{Type: child.EventFailed, Error: &child.Error{Code: child.CodeDiskFull, Message: "write state: no space left on device"}})
				return 1
			}
			if err := writeResume(config.Dir, step); err != nil {
				return 6
			}
			send(child.TrainerEvent{Type: child.EventSaved, Step: step})
		}
	}
	if b.WrongAdapter {
		config.BaseDigest = digestOf([]byte("another"))
	}
	if err := writeAdapter(config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 7
	}
	send(child.TrainerEvent{Type: child.EventDone})
	return 0
}

func resumeStep(dirs []string) (step int) {
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, resumeFile))
		if err == nil && json.Unmarshal(data, &step) == nil {
			return step
		}
	}
	return 0
}

func writeResume(dir string, step int) error {
	temp := filepath.Join(dir, resumeFile+".tmp")
	if err := os.WriteFile(temp, []byte(strconv.Itoa(step)), 0o600); err != nil {
		return err
	}
	return os.Rename(temp, filepath.Join(dir, resumeFile))
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func writeAdapter(config child.TrainerConfig) error {
	if err := os.MkdirAll(config.AdapterDir, 0o700); err != nil {
		return err
	}
	weights := []byte("weights of " + config.AdapterID)
	settings := []byte(`{"r":16,"lora_alpha":32,"use_rslora":false,"target_modules":["q_proj","v_proj"],"layers_to_transform":null}`)
	m := lora.Manifest{
		ID: config.AdapterID, Name: config.AdapterName, BaseModel: config.BaseModel, BaseDigest: config.BaseDigest, JobID: config.JobID,
		Rank: 16, Alpha: 32, TargetModules: []string{"q_proj", "v_proj"}, Files: map[string]string{lora.GGUFFile: digestOf(weights), lora.PEFTConfig: digestOf(settings)},
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(config.AdapterDir, lora.GGUFFile), weights, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(config.AdapterDir, lora.PEFTConfig), settings, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(config.AdapterDir, lora.ManifestFile), data, 0o600)
}

// process is a trainer process of a test.
type process struct {
	command *exec.Cmd
	stdin   io.WriteCloser
	events  chan child.TrainerEvent
	mu      sync.Mutex // of stdin
}

func startTrainer(ctx context.Context, config child.TrainerConfig) (finetune.Trainer, error) {
	command := exec.CommandContext(ctx, os.Args[0])
	command.Env = append(os.Environ(), "FINETUNE_TEST_TRAINER=1")
	command.Stderr = os.Stderr
	stdin, err := command.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := command.Start(); err != nil {
		return nil, err
	}
	p := &process{command: command, stdin: stdin, events: make(chan child.TrainerEvent)}
	go func() {
		defer close(p.events)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var e child.TrainerEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				panic(err)
			}
			p.events <- e
		}
	}()
	return p, p.send(config)
}

func (p *process) send(v any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return json.NewEncoder(p.stdin).Encode(v)
}

func (p *process) Events() <-chan child.TrainerEvent { return p.events }
func (p *process) Stop() error                       { return p.send(child.TrainerCommand{Op: "stop"}) }
func (p *process) Kill()                             { _ = p.command.Process.Kill() }
func (p *process) Wait() error                       { return p.command.Wait() }

// models knows one base model.
type models struct{}

var baseDigest = digestOf([]byte("base"))

func (models) Base(_ context.Context, name string) (dir, digest string, err error) {
	if name != "base" {
		return "", "", fmt.Errorf("model %q: %w", name, finetune.ErrUnknownModel)
	}
	return "/nonexistent/models/base", baseDigest, nil
}

// server is the part of a server that jobs need, over a data directory.
type server struct {
	store    *store.Store
	registry *adapters.Registry
	jobs     *finetune.Jobs
}

func openServer(ctx context.Context, dir string, logger *slog.Logger, edits ...func(*finetune.Options)) (*server, error) {
	st, err := store.Open(ctx, dir, store.Options{Logger: logger})
	if err != nil {
		return nil, err
	}
	registry, err := adapters.Open(ctx, filepath.Join(dir, "adapters"), st, adapters.Options{Logger: logger})
	if err != nil {
		return nil, errors.Join(err, st.Close())
	}
	opts := finetune.Options{
		Store: st, Models: models{}, Adapters: registry, Start: startTrainer, Dir: filepath.Join(dir, "jobs"), Logger: logger,
		Device: "cpu", MemoryBytes: 5 << 30, CacheDir: filepath.Join(dir, "cache"), RetryDelay: 5 * time.Millisecond, CancelGrace: 500 * time.Millisecond, Heartbeat: 50 * time.Millisecond,
	}
	for _, edit := range edits {
		edit(&opts)
	}
	jobs := finetune.New(opts)
	return &server{store: st, registry: registry, jobs: jobs}, jobs.Start(ctx)
}

func (s *server) close(ctx context.Context) error {
	return errors.Join(s.jobs.Stop(ctx), s.registry.Close(), s.store.Close())
}

// serverMain is a server that creates a job and is killed in the middle of it.
func serverMain(dir string) int {
	ctx := context.Background()
	s, err := openServer(ctx, dir, slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	file, err := s.store.CreateFile(ctx, "train.jsonl", "fine-tune", bytes.NewReader([]byte(goodRow)))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_, err = s.jobs.Create(ctx, finetune.Spec{
		Model: "base", TrainingFile: file.ID, Options: behaviour{Steps: 8, Delay: 100 * time.Millisecond}.options(),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	select {}
}
