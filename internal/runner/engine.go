package runner

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/llama"
)

// Engines of Options.
const (
	engineAuto  = "auto"
	engineOwn   = "own"
	engineLlama = "llama"
)

// weightsBF16 is the GPUWeights that are copied; the others are as in the file.
const weightsBF16 = "bf16"

// load decides where and with which engine the model is computed, and loads it: vocabulary, decoder, scheduler.
func (r *Runner) load(path string, o Options) error {
	if o.Engine == "" {
		o.Engine = engineAuto
	}
	if o.Engine != engineAuto && o.Engine != engineOwn && o.Engine != engineLlama {
		return &child.Error{Code: child.CodeInvalidRequest, Param: "engine", Message: fmt.Sprintf("engine is %q, expected auto, own or llama", o.Engine)}
	}
	if o.GPUWeights != "" && o.GPUWeights != "stored" && o.GPUWeights != weightsBF16 {
		return &child.Error{Code: child.CodeInvalidRequest, Param: "gpu_weights", Message: fmt.Sprintf("gpu_weights is %q, expected stored or bf16", o.GPUWeights)}
	}
	if o.CacheType != "" && o.CacheType != "f16" && o.CacheType != "q8_0" {
		return &child.Error{Code: child.CodeInvalidRequest, Param: "cache_type", Message: fmt.Sprintf("cache_type is %q, expected f16 or q8_0", o.CacheType)}
	}
	gpu, err := placement(o.Device, weightBytes(r.base, o), o.Logger)
	if err != nil {
		return err
	}
	vocabulary, err := llama.LoadModel(path, llama.ModelOptions{VocabularyOnly: true})
	if err != nil {
		return &child.Error{Code: child.CodeInvalidModel, Message: err.Error()}
	}
	r.model = vocabulary
	r.contextTokens = o.ContextTokens
	trained := vocabulary.TrainingContext()
	if r.contextTokens == 0 {
		r.contextTokens = defaultContextTokens
		if trained > 0 {
			r.contextTokens = min(trained, r.contextTokens)
		}
	}
	if trained > 0 && r.contextTokens > trained {
		o.Logger.Warn("context_tokens is more than the model was trained with: long sequences may come out as nonsense",
			slog.Int("context_tokens", r.contextTokens), slog.Int("trained_context_tokens", trained))
	}
	if o.CacheTokens == 0 {
		o.CacheTokens = min(o.Sequences*r.contextTokens, max(r.contextTokens, poolTokens))
	}
	if o.CacheTokens < r.contextTokens {
		return &child.Error{Code: child.CodeInvalidRequest, Param: "cache_tokens", Message: fmt.Sprintf(
			"cache_tokens is %d, less than the %d tokens that one sequence may have (context_tokens)", o.CacheTokens, r.contextTokens)}
	}
	decoder, err := r.decoder(path, o, gpu)
	if err != nil {
		return err
	}
	r.scheduler = newScheduler(decoder, o.Sequences, o.AdapterBytes)
	r.scheduler.loaded.check = r.checkAdapter
	return nil
}

// decoder returns the engine. With hone's own, llama.cpp keeps the vocabulary alone.
func (r *Runner) decoder(path string, o Options, gpu bool) (engine.Decoder, error) {
	if o.Engine == engineOwn || o.Engine == engineAuto && !gpu {
		if gpu {
			return nil, &child.Error{Code: child.CodeInvalidRequest, Param: "engine", Message: "engine own computes on the CPU; on a GPU it must be auto or llama"}
		}
		d, err := r.ownDecoder(o)
		var unsupported *graph.UnsupportedError
		switch {
		case err == nil:
			r.engine = engineOwn
			return d, nil
		case !errors.As(err, &unsupported):
			return nil, fmt.Errorf("model %s: %w", path, err)
		case o.Engine == engineOwn:
			return nil, &child.Error{Code: child.CodeInvalidModel, Message: fmt.Sprintf("model %s: engine own: %v", path, err)}
		}
		o.Logger.Debug("llama.cpp computes the model", slog.Any("reason", err))
	}
	return r.llamaDecoder(path, o, gpu)
}

// ownDecoder returns hone's graph.
func (r *Runner) ownDecoder(o Options) (engine.Decoder, error) {
	// The graph adds two pages for each sequence. Those that only keep prefixes are not worth them.
	numbers := sequenceNumbers(o)
	options := graph.ServerOptions{
		Threads: o.Threads, Sequences: numbers, BatchTokens: batchTokens, CacheType: ggml.F16,
		CacheTokens: max(r.contextTokens, o.CacheTokens-2*ggml.PageTokens*(numbers-o.Sequences)),
	}
	if o.CacheType == "q8_0" {
		options.CacheType = ggml.Q8_0
	}
	memory, err := graph.ServerBytes(r.base, options)
	if err != nil {
		return nil, err
	}
	r.memory = int64(memory.Weights + memory.Cache + memory.Activations)
	return graph.NewServer(r.base, options)
}

// sequenceNumbers is how many a decoder gets: those that do not run keep prefixes.
func sequenceNumbers(o Options) int { return max(2*o.Sequences, min(64, o.CacheTokens/128)) }

func (r *Runner) llamaDecoder(path string, o Options, gpu bool) (engine.Decoder, error) {
	model, batch, micro := llama.ModelOptions{}, batchTokens, batchTokens
	if gpu {
		model.GPULayers, batch, micro = llama.AllLayers, gpuBatchTokens, gpuMicroBatchTokens
	}
	if gpu && o.GPUWeights == weightsBF16 {
		copied, err := widened(r.base)
		if err != nil {
			return nil, err
		}
		defer os.Remove(copied) // its weights are in the GPU's memory then
		path = copied
	}
	whole, err := llama.LoadModel(path, model)
	if err != nil {
		return nil, &child.Error{Code: child.CodeInvalidModel, Message: err.Error()}
	}
	r.model.Close()
	r.model, r.engine = whole, engineLlama
	attention := llama.AttentionFlash
	if gpu {
		attention = llama.AttentionAuto // a library may be built without the flash kernels (FLASH_ATTENTION)
	}
	sequences := sequenceNumbers(o)
	if whole.Recurrent() { // a state for each
		sequences = 2 * o.Sequences
	}
	d, err := llama.NewDecoder(whole, llama.ContextOptions{
		Tokens: o.CacheTokens, Sequences: sequences, BatchTokens: batch, MicroBatchTokens: micro, Threads: o.Threads, Attention: attention, CacheQ8: o.CacheType == "q8_0",
	})
	if err != nil {
		return nil, fmt.Errorf("model %s: %w", path, err)
	}
	return d, nil
}

// batchTokens is the most tokens of one batch. Longer ones are no faster; they would only make streams and cancelled
// requests wait longer.
const batchTokens = 512

// gpuBatchTokens is that of a GPU, which needs more to be busy: about 24 questions at once.
const gpuBatchTokens = 2048

// gpuMicroBatchTokens is the part of it that is computed at once. While a GPU computes one, the CPU prepares the next: its
// mask has an element for each token and cell.
const gpuMicroBatchTokens = 1024

// checkAdapter reads the file of an adapter before an engine does.
func (r *Runner) checkAdapter(path string) error {
	file, err := gguf.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return gguf.CheckAdapter(file, r.base)
}

// weightBytes is what the weights take in a GPU's memory.
func weightBytes(f *gguf.File, o Options) int64 {
	if o.GPUWeights != weightsBF16 {
		return f.Size
	}
	var bytes int64
	for _, t := range f.Tensors {
		bytes += 2 * t.Elements()
	}
	return bytes
}

// placement decides whether a model of so many bytes is computed on a GPU. Its error is a *child.Error: the GPU that was
// asked for is not there.
func placement(device string, bytes int64, logger *slog.Logger) (gpu bool, err error) {
	if device == "" || device == "cpu" {
		return false, nil
	}
	devices, err := ggml.Devices("")
	switch {
	case err != nil && device == "cuda":
		return false, &child.Error{Code: child.CodeInvalidRequest, Param: "device", Message: fmt.Sprintf("device cuda: %v", err)}
	case err != nil:
		logger.Debug("no GPU", slog.Any("reason", err))
		return false, nil
	}
	// The cache and the buffers of computation take about a quarter of a model's size again.
	need := bytes + bytes/4
	for _, d := range devices {
		if device == "cuda" || int64(d.FreeBytes) > need {
			logger.Info("answers are computed on the GPU", slog.String("device", d.Description), slog.Int("free_bytes", d.FreeBytes))
			return true, nil
		}
	}
	logger.Info("the model does not fit into the GPU", slog.Int64("needed_bytes", need))
	return false, nil
}
