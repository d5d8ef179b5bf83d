package app

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/server"
)

// baseModels shows the model store as the API and the jobs want to see it.
type baseModels struct{ store *models.Store }

func (b baseModels) List(context.Context) ([]server.BaseModel, error) {
	list, err := b.store.List()
	if err != nil {
		return nil, err
	}
	bases := make([]server.BaseModel, len(list))
	for i, m := range list {
		bases[i] = baseModel(m)
	}
	return bases, nil
}

func (b baseModels) Get(_ context.Context, name string) (server.BaseModel, error) {
	m, err := b.store.Get(name)
	if errors.Is(err, models.ErrNotFound) {
		return server.BaseModel{}, fmt.Errorf("%w: %q", finetune.ErrUnknownModel, name)
	}
	if err != nil {
		return server.BaseModel{}, &child.Error{Code: child.CodeInvalidModel, Message: fmt.Sprintf("the base model %q cannot be used: %v", name, err)}
	}
	return baseModel(m), nil
}

func (b baseModels) Delete(_ context.Context, name string) error {
	err := b.store.Remove(name)
	if errors.Is(err, models.ErrNotFound) {
		return fmt.Errorf("%w: %q", finetune.ErrUnknownModel, name)
	}
	return err
}

// Base is what finetune asks.
func (b baseModels) Base(ctx context.Context, name string) (dir, digest string, err error) {
	m, err := b.Get(ctx, name)
	return m.Dir, m.Digest, err
}

func baseModel(m models.Model) server.BaseModel {
	return server.BaseModel{
		Base:         child.Base{Name: m.Name, Dir: m.Dir, Digest: m.Digest},
		Architecture: m.Architecture, ContextTokens: m.ContextTokens, CreatedAt: m.CreatedAt,
	}
}

// trainable says why a base model cannot be trained.
func (a *App) trainable(dir string) error {
	if a.opts.Trainable == nil {
		return nil
	}
	return a.opts.Trainable(filepath.Join(dir, models.WeightsFile))
}

// Limits of a runner's cache where the configuration has no number, as the runner decides them.
const (
	defaultSequences     = 8
	defaultContextTokens = 8192
	defaultCacheTokens   = 16384
	// runnerOverhead is what a runner takes beside weights and cache: buffers of a batch, tokenizer, adapters.
	runnerOverhead = 128 << 20
)

// runnerBytes estimates what a runner will take: the weights once, the cache, and overhead. It reads the header of the
// file, which was checked when the model was added; of one that is damaged the runner says what is wrong.
func runnerBytes(base child.Base, config child.RunnerConfig) (int64, error) {
	path := filepath.Join(base.Dir, models.WeightsFile)
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	f, err := gguf.Open(path)
	if err != nil {
		return info.Size(), nil
	}
	defer f.Close()
	elements, err := gguf.KeyValueElements(f)
	if err != nil {
		return info.Size(), nil
	}
	contextTokens := cmp.Or(config.ContextTokens, defaultContextTokens)
	architecture, _ := f.Metadata.String("general.architecture")
	if trained, ok := f.Metadata.Uint(architecture + ".context_length"); ok && config.ContextTokens == 0 {
		contextTokens = min(contextTokens, int(trained))
	}
	tokens := cmp.Or(config.CacheTokens, min(cmp.Or(config.Sequences, defaultSequences)*contextTokens, max(contextTokens, defaultCacheTokens)))
	cache := int64(tokens) * elements * 2
	if config.CacheType == "q8_0" {
		cache = cache * 17 / 32 // 34 bytes for 32 elements
	}
	return info.Size() + cache + runnerOverhead, nil
}

// trainerLog is kept in the directory of each attempt, also after the job.
const trainerLog = "trainer.log"

// startTrainer starts an attempt's trainer, whose standard error goes to a file of the attempt.
func (a *App) startTrainer(_ context.Context, config child.TrainerConfig) (finetune.Trainer, error) {
	if err := os.MkdirAll(config.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of the attempt: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(config.Dir, trainerLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log of the attempt: %w", err)
	}
	// The server's memory is the machine's. Of a job that names a GPU, the budget of the configuration is the GPU's.
	most := config.MemoryBytes
	if config.Options.Device != nil && *config.Options.Device == "cuda" {
		most = 0
	}
	grant, err := a.memory.ReserveRest("the job "+config.JobID, most)
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	//nolint:contextcheck // a trainer is ended by Stop and Kill
	trainer, err := child.StartTrainer(child.TrainerOptions{Exe: a.opts.Exe, Env: a.opts.Env, Config: config, Stderr: log, Logger: a.opts.Logger, Grant: grant})
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	return &loggedTrainer{Trainer: trainer, log: log}, nil
}

// loggedTrainer closes the log when the trainer has ended.
type loggedTrainer struct {
	*child.Trainer

	log *os.File
}

func (t *loggedTrainer) Wait() error {
	err := t.Trainer.Wait()
	_ = t.log.Close() // nothing depends on the log
	return err
}
