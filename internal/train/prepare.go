package train

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/dataset"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/lora"
)

func (t *trainer) basePath() string { return filepath.Join(t.config.ModelDir, "base.gguf") }

// cacheDir keeps what later attempts and jobs can use: tokenized files and reference log-probabilities.
func (t *trainer) cacheDir() string {
	if t.config.CacheDir != "" {
		return t.config.CacheDir
	}
	return t.config.Dir
}

// prepare reads the data, decides the plan or takes it from a resume state, and loads the model and the adapter. It
// reports the dataset, the memory and the plan, in this order; a dry run ends there. It returns the resume state, if
// there is one.
func (t *trainer) prepare(ctx context.Context) (*resumeState, error) {
	invalid := func(err error) error {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
	}
	file, err := gguf.Open(t.basePath())
	if err != nil {
		return nil, invalid(err)
	}
	defer file.Close()
	if err := gguf.CheckModel(file); err != nil {
		return nil, invalid(err)
	}
	shape, err := graph.ReadShape(file)
	if err != nil {
		return nil, invalid(err)
	}
	t.architecture, _ = file.Metadata.String("general.architecture")
	start, err := t.readStart(file)
	if err != nil {
		return nil, err
	}
	f := facts{
		Rows: 1, Weights: shape.Parameters() + shape.Vocabulary*shape.Embedding, Layers: shape.Layers,
		Valid: t.config.ValidationFile != "", FewAnswers: true, Method: t.config.Method, Seed: t.config.Seed, Start: startPlan(start),
	}
	if f.MaxLength, err = MaxLength(t.config.Options, shape); err != nil {
		return nil, optionFailure(err)
	}
	// Before the data are read, which may take minutes: no option is refused for the number of rows alone.
	if t.plan, err = NewPlan(t.config.Options, f); err != nil {
		return nil, optionFailure(err)
	}
	if err := t.readData(ctx); err != nil {
		return nil, err
	}
	f.Rows, f.FewAnswers = t.data.Rows, t.validChoices != nil
	state, err := t.resume()
	if err != nil {
		return nil, err
	}
	if state == nil {
		if t.plan, err = NewPlan(t.config.Options, f); err != nil {
			return nil, optionFailure(err)
		}
	}
	if err := t.sharePrefixes(state == nil); err != nil {
		return nil, err
	}
	if err := t.planMemory(file, state == nil); err != nil {
		return nil, err
	}
	if t.config.DryRun {
		return state, t.emitPlan()
	}
	if err := t.load(ctx, file, start); err != nil {
		return nil, err
	}
	return state, t.emitPlan()
}

func (t *trainer) emitPlan() error {
	err := t.emit(child.TrainerEvent{Type: child.EventPlan, Plan: &t.plan, Step: t.step, TotalSteps: t.plan.TotalSteps})
	if err != nil {
		return err
	}
	return t.reportAgain()
}

// readStart reads the adapter to go on from; nil if there is none.
func (t *trainer) readStart(base *gguf.File) (*lora.Weights, error) {
	if t.config.StartAdapter == "" {
		return nil, nil
	}
	w, err := lora.Read(t.config.StartAdapter, base)
	if err == nil && w.Manifest.BaseDigest != "" && w.Manifest.BaseDigest != t.config.BaseDigest {
		err = fmt.Errorf("it belongs to the base model %.12s, the job's is %.12s", w.Manifest.BaseDigest, t.config.BaseDigest)
	}
	if err != nil {
		return nil, &child.Error{Code: child.CodeInvalidAdapter, Message: "the adapter to continue from: " + err.Error(), Param: "model"}
	}
	return &w, nil
}

// startPlan is what an adapter says about a plan.
func startPlan(w *lora.Weights) *child.TrainPlan {
	if w == nil {
		return nil
	}
	return &child.TrainPlan{
		R: w.Manifest.Rank, LoraAlpha: w.Manifest.Alpha, UseRSLoRA: w.UseRSLoRA,
		TargetModules: w.Manifest.TargetModules, LayersToTransform: w.LayersToTransform,
	}
}

// resume finds the newest valid resume state and takes its plan and position.
func (t *trainer) resume() (*resumeState, error) {
	state, skipped := findState(t.config.ResumeFrom, t.config.JobID, t.config.BaseDigest)
	for _, err := range skipped {
		if err := t.warn("Skipped a resume state: %v", err); err != nil {
			return nil, err
		}
	}
	if state == nil {
		return nil, nil
	}
	if state.Rows != t.data.Rows {
		return nil, fmt.Errorf("the resume state is of %d training rows, the file has %d", state.Rows, t.data.Rows)
	}
	t.plan, t.position = state.Plan, state.position()
	t.plan.ResumedStep, t.saved = state.Step, state.Step
	return state, nil
}

// minSharedTokens is the share of tokens from which on "auto" computes shared prefixes once.
const minSharedTokens = 0.1

// sharePrefixes decides whether rows share what they begin with, unless a resume state says it, and reports the dataset.
func (t *trainer) sharePrefixes(decide bool) error {
	shared := 0.0
	if wanted := t.config.Options.PrefixSharing; wanted == nil || *wanted {
		var err error
		if shared, err = t.data.Shared(t.data.Order(t.plan.Seed, 0), t.plan.BatchSize, t.microTokens()); err != nil {
			return err
		}
		if decide {
			// With dropout, rows that share a beginning share its masks, which slows learning down (RATIONALE.md).
			t.plan.PrefixSharing = wanted != nil || shared >= minSharedTokens && t.plan.LoraDropout == 0
		}
	}
	e := child.TrainerEvent{
		Type: child.EventDataset, TrainRows: t.data.Rows, TrainTokens: t.data.Tokens, DroppedRows: t.data.Dropped, TruncatedRows: t.data.Truncated,
	}
	if t.plan.PrefixSharing {
		e.SharedTokens = int(shared * float64(t.data.Tokens))
	}
	if t.valid != nil {
		e.ValidRows, e.ValidTokens = t.valid.Rows, t.valid.Tokens
		e.DroppedRows += t.valid.Dropped
		e.TruncatedRows += t.valid.Truncated
	}
	if e.DroppedRows+e.TruncatedRows > 0 {
		e.LongRows = &child.LongRows{MaxLength: t.plan.MaxLength, TrainDropped: t.data.DroppedLines, TrainTruncated: t.data.TruncatedLines}
		if t.valid != nil {
			e.LongRows.ValidDropped, e.LongRows.ValidTruncated = t.valid.DroppedLines, t.valid.TruncatedLines
		}
	}
	return t.emit(e)
}

// load brings the model and an adapter, new or the one to go on from, into memory.
func (t *trainer) load(ctx context.Context, file *gguf.File, start *lora.Weights) error {
	layout, err := graph.ParseLayout(t.plan.Memory.Forward + "/" + t.plan.Memory.Backward)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if t.model, err = graph.Load(file, t.backend, layout); err != nil {
		var unsupported *graph.UnsupportedError
		if errors.As(err, &unsupported) {
			return &child.Error{Code: child.CodeInvalidModel, Message: err.Error(), Param: "model"}
		}
		if errors.Is(err, ggml.ErrMemory) {
			m := t.plan.Memory
			return &child.Error{
				Code: child.CodeInsufficientMemory, Param: "hone.memory",
				Message: fmt.Sprintf("the weights take %d MiB, which could not be allocated although %d MiB were free: free some memory, or ask for a smaller layout with the option memory", m.WeightBytes>>20, m.FreeBytes>>20),
			}
		}
		return err
	}
	t.model.Recompute = t.plan.Memory.Recompute
	options, err := loraOptions(t.plan)
	if err != nil {
		return optionFailure(err)
	}
	if t.lora, err = t.model.NewLoRA(options); err != nil {
		return err
	}
	if err := t.reserve(); err != nil {
		return err
	}
	t.moments = newMoments(len(t.lora.Parameters))
	t.compute = func(m dataset.Micro) (engine.Result, error) { return t.model.Gradients(m.Batch, t.lora, 1) }
	if start != nil {
		return setWeights(t.lora, *start)
	}
	initialise(t.lora, t.plan.InitLoraWeights, t.plan.Seed)
	return nil
}

func loraOptions(p child.TrainPlan) (graph.LoRAOptions, error) {
	modules, err := modulesOf(p.TargetModules)
	if err != nil {
		return graph.LoRAOptions{}, &OptionError{"target_modules", err.Error()}
	}
	return graph.LoRAOptions{
		Rank: p.R, Alpha: p.LoraAlpha, RankScale: p.UseRSLoRA, Dropout: p.LoraDropout, Modules: modules, Layers: p.LayersToTransform,
	}, nil
}

// begin sets the objective and takes the arrays of the resume state.
func (t *trainer) begin(ctx context.Context, state *resumeState) error {
	switch {
	case t.plan.Method == methodDPO:
		// Before the arrays of the resume state: the reference is what training began with.
		var err error
		if t.objective, err = t.preferences(ctx, t.data); err != nil {
			return err
		}
		if t.validObjective, err = t.preferences(ctx, t.valid); err != nil {
			return err
		}
	case len(t.plan.Choices) > 0:
		t.objective, t.validObjective = choice{}, choice{}
	default:
		t.objective, t.validObjective = supervised{}, supervised{}
	}
	t.savedAt = time.Now()
	if state == nil {
		return nil
	}
	return state.restore(t.lora.Parameters, t.moments)
}

// preferences is the objective of a preference job over one of its files, which may be nil.
func (t *trainer) preferences(ctx context.Context, d *dataset.Dataset) (objective, error) {
	if d == nil {
		return nil, nil
	}
	reference, err := t.references(ctx, d)
	if err != nil {
		return nil, err
	}
	p := preference{beta: t.plan.Beta, smoothing: t.plan.LabelSmoothing, ipo: t.plan.LossType == "ipo"}
	return preferences{p, reference}, nil
}

func optionFailure(err error) error {
	var option *OptionError
	if errors.As(err, &option) {
		return &child.Error{Code: child.CodeInvalidRequest, Message: err.Error(), Param: "hone." + option.Option}
	}
	return err
}
