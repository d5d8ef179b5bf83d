// Package child is what serve and its children (runner and trainer) say to each other, and how serve starts,
// watches and ends them.
//
// A child is this same binary with the hidden command `runner` or `trainer`. Its first line of standard input is a
// JSON configuration (RunnerConfig, TrainerConfig); the pipe then stays open, and its end tells the child that the
// parent is gone. Standard output carries one JSON object a line (RunnerEvent, TrainerEvent); standard error is the log.
// The runner also serves HTTP on a unix socket: POST /generate with a GenerateRequest answers NDJSON GenerateEvents,
// POST /embed and POST /tokenize one JSON object.
package child

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/wire"
)

// RunnerConfig is the first line of a runner's standard input.
type RunnerConfig struct {
	Socket        string `json:"socket"`           // path of the unix socket to listen on
	ModelDir      string `json:"model_dir"`        // models/<name>: base.gguf, tokenizer.json?, chat_template.jinja?
	ContextTokens int    `json:"context_tokens"`   // longest prompt + completion of one sequence; 0 takes the model's own, at most 8192
	Sequences     int    `json:"sequences"`        // sequences decoded in one batch; 0 means 8
	Threads       int    `json:"threads"`          // 0 means all cores
	Device        string `json:"device,omitempty"` // cpu ("" too), cuda, or auto: a GPU if there is one and the model fits into it

	CacheTokens  int    `json:"cache_tokens,omitempty"`  // cells of the key-value cache; 0: by Sequences and ContextTokens
	CacheType    string `json:"cache_type,omitempty"`    // f16 ("" too), q8_0
	GPUWeights   string `json:"gpu_weights,omitempty"`   // stored ("" too), bf16: a copy for the GPU, several times as large and faster
	Engine       string `json:"engine,omitempty"`        // auto ("" too): hone's own where it can; own, llama
	Queue        int    `json:"queue,omitempty"`         // requests that may wait; 0 means 256
	AdapterBytes int64  `json:"adapter_bytes,omitempty"` // of idle adapters kept in memory; 0 means 256 MiB
	MemoryBytes  int64  `json:"memory_bytes,omitempty"`  // budget that the server granted; 0: none
}

// RunnerEvent is one line of a runner's standard output. The first is ready or failed.
type RunnerEvent struct {
	Type          string `json:"type"` // ready, failed
	ContextTokens int    `json:"context_tokens,omitempty"`
	MemoryBytes   int64  `json:"memory_bytes,omitempty"` // of ready: what it holds and may still fill: weights laid out anew, cache, buffers; not the mapped file
	Error         *Error `json:"error,omitempty"`
}

// Adapter names the LoRA adapter that a request is answered with.
type Adapter struct {
	ID   string `json:"id"`   // cache key in the runner
	Path string `json:"path"` // adapter.gguf
	// SHA256 is that of the file, hex; another file is refused. "" takes any.
	SHA256 string `json:"sha256,omitempty"`
}

// GenerateRequest asks the runner for N completions of one prompt. Exactly one of Messages, Prompt and PromptTokens is set.
type GenerateRequest struct {
	ID           string         `json:"id"`
	Client       string         `json:"client,omitempty"`     // whose request it is, for fair queueing: a key's name, or "" for all others
	Background   bool           `json:"background,omitempty"` // nobody waits for it: it yields to all that are not
	Adapter      *Adapter       `json:"adapter,omitempty"`
	Messages     []wire.Message `json:"messages,omitempty"`
	Prompt       *string        `json:"prompt,omitempty"`        // plain completion: no template
	PromptTokens []engine.Token `json:"prompt_tokens,omitempty"` // the same as token ids

	// Of Messages.
	Tools                json.RawMessage `json:"tools,omitempty"`           // OpenAI's array, checked by the server
	ToolChoice           ToolChoice      `json:"tool_choice,omitzero"`      // none ("" without tools), auto, required, function
	ParallelToolCalls    bool            `json:"parallel_tool_calls"`       // several calls in one answer are allowed
	EnableThinking       *bool           `json:"enable_thinking,omitempty"` // chat_template_kwargs
	ReasoningEffort      string          `json:"reasoning_effort,omitempty"`
	ContinueFinalMessage bool            `json:"continue_final_message,omitempty"`

	N           int      `json:"n,omitempty"`           // completions, each with its Index; 0 means 1, at most 8
	MaxTokens   int      `json:"max_tokens"`            // 0: until the context is full
	MinTokens   int      `json:"min_tokens,omitempty"`  // no end of turn and no stop string before so many
	PromptOnly  bool     `json:"prompt_only,omitempty"` // max_tokens: 0, which with Echo and LogProbs scores the prompt
	IgnoreEOS   bool     `json:"ignore_eos,omitempty"`
	Echo        bool     `json:"echo,omitempty"` // Text and LogProbs begin with the prompt's; its first token has no log-probability (NoLogProb)
	Stop        []string `json:"stop,omitempty"`
	LogProbs    bool     `json:"logprobs,omitempty"`
	TopLogProbs int      `json:"top_logprobs,omitempty"` // 0 to 20

	Temperature       float64                  `json:"temperature"`                // 0 is greedy
	TopP              float64                  `json:"top_p"`                      // 1 keeps all
	TopK              int                      `json:"top_k,omitempty"`            // 0 keeps all
	MinP              float64                  `json:"min_p,omitempty"`            // of the likeliest token's probability; 0 keeps all
	PresencePenalty   float64                  `json:"presence_penalty,omitempty"` // OpenAI's: over the completion's tokens
	FrequencyPenalty  float64                  `json:"frequency_penalty,omitempty"`
	RepetitionPenalty float64                  `json:"repetition_penalty,omitempty"` // CTRL's, over prompt and completion; 0 means 1, none
	LogitBias         map[engine.Token]float64 `json:"logit_bias,omitempty"`         // -100 to 100, added to the logits
	Seed              *int64                   `json:"seed,omitempty"`

	Constraint *Constraint `json:"constraint,omitempty"`
}

// ToolChoice is OpenAI's tool_choice: Mode, and with ToolFunction the name of the one that must be called.
type ToolChoice struct {
	Mode string `json:"mode,omitempty"`
	Name string `json:"name,omitempty"`
}

// Modes of ToolChoice.
const (
	ToolNone     = "none"
	ToolAuto     = "auto"
	ToolRequired = "required"
	ToolFunction = "function"
)

// Constraint is what a completion must match as a whole.
type Constraint struct {
	Kind string `json:"kind"`
	// Choices, of ConstraintChoice: the completion is the one with the highest probability as a whole, or with a
	// temperature drawn by these probabilities. Log-probabilities are renormalised over the choices.
	Choices []string `json:"choices,omitempty"`
	Text    string   `json:"text,omitempty"` // schema, regular expression or grammar
}

// Kinds of Constraint.
const (
	ConstraintChoice     = "choice"
	ConstraintJSONObject = "json_object"
	ConstraintJSONSchema = "json_schema"
	ConstraintRegex      = "regex"
	ConstraintLark       = "lark"
)

// GenerateEvent is one line of the answer to POST /generate. Each completion has events with its Index, one of them with
// a FinishReason; the last event of all has Usage or Error.
type GenerateEvent struct {
	Index     int             `json:"index,omitempty"`
	Text      string          `json:"text,omitempty"`
	Reasoning string          `json:"reasoning,omitempty"`  // between <think> and </think>
	ToolCalls []ToolCallDelta `json:"tool_calls,omitempty"` // parsed out of the text
	LogProbs  []TokenLogProb  `json:"logprobs,omitempty"`   // of the tokens of Text, Reasoning and ToolCalls
	// ChoiceProbabilities, of a choice constraint, comes with FinishReason: one for each choice, in the request's order, summing to 1.
	ChoiceProbabilities []float64 `json:"choice_probabilities,omitempty"`
	FinishReason        string    `json:"finish_reason,omitempty"` // stop, length, tool_calls
	Usage               *Usage    `json:"usage,omitempty"`         // of all completions, with the last FinishReason
	Error               *Error    `json:"error,omitempty"`
}

// ToolCallDelta adds to a tool call: the first of an Index has ID and Name, all may have a part of Arguments.
type ToolCallDelta struct {
	Index     int    `json:"index"`
	ID        string `json:"id,omitempty"`
	Name      string `json:"name,omitempty"`
	Arguments string `json:"arguments,omitempty"`
}

// NoLogProb stands for the log-probability that the first token of a text does not have.
const NoLogProb = 1

// EmbedRequest is the body of POST /embed; the answer is EmbedResponse, or a GenerateEvent with Error.
type EmbedRequest struct {
	ID         string   `json:"id"`
	Client     string   `json:"client,omitempty"`
	Background bool     `json:"background,omitempty"`
	Adapter    *Adapter `json:"adapter,omitempty"`
	Inputs     []Input  `json:"inputs"`
}

// Input is a text or its token ids.
type Input struct {
	Text   string         `json:"text,omitempty"`
	Tokens []engine.Token `json:"tokens,omitempty"` // if not nil
}

// EmbedResponse has one vector for each input: the mean of the last hidden states, of length 1.
type EmbedResponse struct {
	Vectors      [][]float32 `json:"vectors"`
	PromptTokens int         `json:"prompt_tokens"`
	CachedTokens int         `json:"cached_tokens,omitempty"`
}

// TokenizeRequest is the body of POST /tokenize: a text, messages with their template, or token ids to turn into text.
type TokenizeRequest struct {
	Text             *string         `json:"text,omitempty"`
	AddSpecialTokens bool            `json:"add_special_tokens"` // of Text: BOS where the model wants it
	Messages         []wire.Message  `json:"messages,omitempty"`
	Tools            json.RawMessage `json:"tools,omitempty"`
	Tokens           []engine.Token  `json:"tokens,omitempty"`
}

// TokenizeResponse answers all three.
type TokenizeResponse struct {
	Tokens        []engine.Token `json:"tokens"`
	Pieces        [][]byte       `json:"pieces"` // bytes of each token
	Text          string         `json:"text"`   // of Tokens
	ContextTokens int            `json:"context_tokens"`
	BOS           string         `json:"bos"` // the tokens that begin and end a text, "" if there is none
	EOS           string         `json:"eos"`
}

// TokenLogProb is a token's piece, its log-probability (natural logarithm) and the most likely alternatives.
type TokenLogProb struct {
	Token   string         `json:"token"`
	Bytes   []byte         `json:"bytes"` // the piece; JSON base64
	LogProb float64        `json:"logprob"`
	Top     []TokenLogProb `json:"top,omitempty"`
}

// Usage counts tokens; CachedTokens of the prompt were found in the prefix cache, ReasoningTokens of the completions were
// written before their answers.
type Usage struct {
	PromptTokens     int `json:"prompt_tokens"`
	CompletionTokens int `json:"completion_tokens"`
	CachedTokens     int `json:"cached_tokens"`
	ReasoningTokens  int `json:"reasoning_tokens,omitempty"`
}

// Error is a refusal or a failure as a child reports it. Code is one of the Code constants.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Param   string `json:"param,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Codes of Error.
const (
	CodeContextLength  = "context_length_exceeded"
	CodeInvalidRequest = "invalid_request"
	CodeInvalidModel   = "invalid_model"
	CodeInvalidAdapter = "invalid_adapter"
	CodeInvalidFile    = "invalid_training_file"
	CodeInternal       = "internal_error"
	CodeOverloaded     = "overloaded"  // the runner's queue is full: 429 with Retry-After
	CodeEndsEngine     = "ends_engine" // a request with which the engine has ended again and again: 400
	// No plan of a trainer, or no runner of a model, fits into the memory; and the loss was not a number again and again. The
	// messages say what would help.
	CodeInsufficientMemory = "insufficient_memory"
	CodeDiverged           = "training_diverged"
	CodeDiskFull           = "disk_full" // of a trainer: no space left; the job goes on when there is room
)

// TrainerConfig is the first line of a trainer's standard input: one attempt at one job.
type TrainerConfig struct {
	JobID          string       `json:"job_id"`
	Attempt        int          `json:"attempt"`
	ModelDir       string       `json:"model_dir"` // models/<name> of the base model
	BaseModel      string       `json:"base_model"`
	BaseDigest     string       `json:"base_digest"`             // sha256 of base.gguf, hex
	TrainingFile   string       `json:"training_file"`           // path of the JSONL
	ValidationFile string       `json:"validation_file"`         // "" if none
	Dir            string       `json:"dir"`                     // jobs/<id>/a<attempt>: resume states are written here
	ResumeFrom     []string     `json:"resume_from"`             // directories of earlier attempts, newest first; the first valid resume state in them is taken
	ReportedStep   int          `json:"reported_step,omitempty"` // the last step that the server knows of; later ones that a resume state has are reported again
	AdapterDir     string       `json:"adapter_dir"`             // where the finished adapter goes: adapter.gguf, PEFT copy, manifest.json last
	AdapterID      string       `json:"adapter_id"`
	AdapterName    string       `json:"adapter_name"` // ft:<base>:local:<suffix>:<id>
	Seed           int64        `json:"seed"`
	Options        TrainOptions `json:"options"`
	Method         string       `json:"method,omitempty"`        // supervised ("" too), dpo
	StartAdapter   string       `json:"start_adapter,omitempty"` // directory of the adapter to continue from (model: ft:...), ours or PEFT's
	CacheDir       string       `json:"cache_dir,omitempty"`     // tokenized files and measured plans; "" takes Dir
	MemoryBytes    int64        `json:"memory_bytes,omitempty"`  // of the device: budget that the server granted; 0: what is free
	// HostMemoryBytes is what the server's memory leaves for this job where it computes on the CPU; 0: no bound.
	HostMemoryBytes int64 `json:"host_memory_bytes,omitempty"`
	DryRun          bool  `json:"dry_run,omitempty"` // emit dataset, plan and memory, then done without training
	Threads         int   `json:"threads"`           // 0 means all cores
}

// Checkpoint says what the checkpoint of a step is: the directory that the trainer writes it into, a complete adapter
// directory with the manifest last, and the id and name in that manifest. The server takes it up under hard links, so that
// the trainer may keep, read and remove its own.
func (c *TrainerConfig) Checkpoint(step int) (dir, id, name string) {
	return filepath.Join(c.Dir, "checkpoints", fmt.Sprintf("step-%d", step)),
		fmt.Sprintf("%s-step-%d", c.AdapterID, step), fmt.Sprintf("%s:ckpt-step-%d", c.AdapterName, step)
}

// TrainOptions are the hyper-parameters of a job as requested; nil (or empty) means "auto". Names are PEFT's
// LoraConfig's, HF TrainingArguments' and TRL's; OpenAI's n_epochs, batch_size, learning_rate_multiplier and beta are
// translated before.
type TrainOptions struct {
	// Adapter: PEFT's LoraConfig.
	R                 *int     `json:"r,omitempty"`                   // 1 to 256; auto: 16
	LoraAlpha         *float64 `json:"lora_alpha,omitempty"`          // auto: 2 r
	LoraDropout       *float64 `json:"lora_dropout,omitempty"`        // auto: 0.05
	UseRSLoRA         *bool    `json:"use_rslora,omitempty"`          // auto: false
	TargetModules     []string `json:"target_modules,omitempty"`      // auto: all seven; "all-linear" is expanded by the trainer
	LayersToTransform []int    `json:"layers_to_transform,omitempty"` // auto: all layers
	InitLoraWeights   *string  `json:"init_lora_weights,omitempty"`   // "true" (auto: kaiming-uniform A, zero B), "gaussian"

	// Optimisation: HF TrainingArguments.
	LearningRate           *float64     `json:"learning_rate,omitempty"` // auto: by model size
	LearningRateMultiplier *float64     `json:"learning_rate_multiplier,omitempty"`
	NumTrainEpochs         *int         `json:"num_train_epochs,omitempty"`
	MaxSteps               *int         `json:"max_steps,omitempty"`
	BatchSize              *int         `json:"batch_size,omitempty"` // examples per optimizer step
	PerDeviceBatchSize     *int         `json:"per_device_train_batch_size,omitempty"`
	GradientAccumulation   *int         `json:"gradient_accumulation_steps,omitempty"` // both together are read as their product, batch_size
	WarmupRatio            *float64     `json:"warmup_ratio,omitempty"`
	WarmupSteps            *int         `json:"warmup_steps,omitempty"`
	LRSchedulerType        *string      `json:"lr_scheduler_type,omitempty"` // cosine (auto), linear, constant, constant_with_warmup, cosine_with_min_lr
	LRSchedulerKwargs      *MinimumRate `json:"lr_scheduler_kwargs,omitempty"`
	WeightDecay            *float64     `json:"weight_decay,omitempty"` // auto: 0
	AdamBeta1              *float64     `json:"adam_beta1,omitempty"`
	AdamBeta2              *float64     `json:"adam_beta2,omitempty"`
	AdamEpsilon            *float64     `json:"adam_epsilon,omitempty"`
	MaxGradNorm            *float64     `json:"max_grad_norm,omitempty"` // auto: 1; 0 turns clipping off

	// Data.
	MaxLength        *int    `json:"max_length,omitempty"`        // tokens; auto: min(model context, 2048)
	LongRows         *string `json:"long_rows,omitempty"`         // rows over max_length: "drop" (auto), or "truncate" from the left of the prompt; an answer is never cut
	TrainOnAll       *bool   `json:"train_on_all,omitempty"`      // loss on every token instead of the assistant's
	PrefixSharing    *bool   `json:"prefix_sharing,omitempty"`    // auto: when it saves 10% of the tokens and there is no dropout
	QuestionTemplate *string `json:"question_template,omitempty"` // recorded in the adapter's manifest, for `hone predict`

	// Objective. Choices restricts loss and accuracy to these answers: every row's last answer must be one of them.
	// Of a DPO job: beta, loss type and label smoothing as TRL's DPOConfig.
	Choices        []string `json:"choices,omitempty"`
	Beta           *float64 `json:"beta,omitempty"`            // auto: 0.1
	LossType       *string  `json:"loss_type,omitempty"`       // sigmoid (auto), ipo
	LabelSmoothing *float64 `json:"label_smoothing,omitempty"` // auto: 0

	// Evaluation, saving and reporting: HF TrainingArguments. A strategy is "no", "steps" or "epoch".
	EvalStrategy           *string  `json:"eval_strategy,omitempty"` // auto: epoch
	EvalSteps              *int     `json:"eval_steps,omitempty"`
	SaveStrategy           *string  `json:"save_strategy,omitempty"` // of checkpoints; auto: epoch
	SaveSteps              *int     `json:"save_steps,omitempty"`
	SaveTotalLimit         *int     `json:"save_total_limit,omitempty"` // checkpoints kept; auto: 3, the best one among them
	SaveMinutes            *float64 `json:"save_minutes,omitempty"`     // resume state; auto: 5; also at every checkpoint and epoch end
	LoggingSteps           *int     `json:"logging_steps,omitempty"`    // auto: 1
	LoadBestModelAtEnd     *bool    `json:"load_best_model_at_end,omitempty"`
	MetricForBestModel     *string  `json:"metric_for_best_model,omitempty"`   // loss (auto), accuracy, choice_accuracy
	EarlyStoppingPatience  *int     `json:"early_stopping_patience,omitempty"` // evaluations without improvement
	EarlyStoppingThreshold *float64 `json:"early_stopping_threshold,omitempty"`

	// Engine.
	Device           *string `json:"device,omitempty"`             // auto, cpu, cuda
	Memory           *string `json:"memory,omitempty"`             // auto, exact, middle, low: the layout of the frozen weights
	MicroBatchTokens *int    `json:"micro_batch_tokens,omitempty"` // auto: 1024
}

// MinimumRate are the lr_scheduler_kwargs of cosine_with_min_lr; exactly one is set.
type MinimumRate struct {
	MinLR     *float64 `json:"min_lr,omitempty"`
	MinLRRate *float64 `json:"min_lr_rate,omitempty"` // of the peak rate
}

// TrainerEvent is one line of a trainer's standard output. Type says which of the other fields are set.
type TrainerEvent struct {
	Type string `json:"type"`

	// dataset: the files were read and tokenized
	TrainRows   int `json:"train_rows,omitempty"`
	ValidRows   int `json:"valid_rows,omitempty"`
	TrainTokens int `json:"train_tokens,omitempty"` // of one epoch
	ValidTokens int `json:"valid_tokens,omitempty"`
	DroppedRows int `json:"dropped_rows,omitempty"` // longer than max_length
	// TruncatedRows lost the left part of their prompt to max_length; SharedTokens of TrainTokens need not be computed
	// because rows share them.
	TruncatedRows int `json:"truncated_rows,omitempty"`
	SharedTokens  int `json:"shared_tokens,omitempty"`
	// LongRows says where the dropped and the truncated rows stand, at most 20 lines of each kind and file.
	LongRows *LongRows `json:"long_rows,omitempty"`

	// memory: how the weights are laid out and what the job will take; before anything is loaded
	Memory *MemoryPlan `json:"memory,omitempty"`

	// plan: every "auto" is decided; training starts, or goes on at Step after a resume
	Plan *TrainPlan `json:"plan,omitempty"`

	// progress: at least every 2 s, also inside a step. Fraction of the current step that is done, in [0, 1).
	Step            int     `json:"step,omitempty"` // optimizer steps done
	TotalSteps      int     `json:"total_steps,omitempty"`
	Fraction        float64 `json:"fraction,omitempty"`
	TokensPerSecond float64 `json:"tokens_per_second,omitempty"`
	SecondsLeft     float64 `json:"seconds_left,omitempty"`

	// step: one optimizer step is done (Step counts it)
	TrainLoss     float64 `json:"train_loss,omitempty"` // mean over trained tokens, nats
	TrainAccuracy float64 `json:"train_mean_token_accuracy,omitempty"`
	LearningRate  float64 `json:"learning_rate,omitempty"`
	GradNorm      float64 `json:"grad_norm,omitempty"`
	TrainedTokens int64   `json:"trained_tokens,omitempty"` // since the job began, all tokens of trained rows
	// Of jobs whose objective compares answers: how often the preferred or right one is the likeliest, and, of DPO, the
	// mean rewards beta * log(policy/reference) of the preferred and of the other answer, as TRL logs them.
	ChoiceAccuracy  *float64 `json:"train_choice_accuracy,omitempty"`
	RewardsChosen   *float64 `json:"rewards_chosen,omitempty"`
	RewardsRejected *float64 `json:"rewards_rejected,omitempty"`

	// eval: the whole validation file. ValidChoiceAccuracy is the share of questions that the predictor would answer
	// right: the likeliest of the choices is the row's answer (or, of DPO, the preferred answer has the higher reward).
	Epoch               int      `json:"epoch,omitempty"`
	ValidLoss           float64  `json:"full_valid_loss,omitempty"`
	ValidAccuracy       float64  `json:"full_valid_mean_token_accuracy,omitempty"`
	ValidChoiceAccuracy *float64 `json:"full_valid_choice_accuracy,omitempty"`
	Best                bool     `json:"best,omitempty"` // the best evaluation so far

	// checkpoint: a servable adapter of Step is on disk in CheckpointDir, which TrainerConfig.Checkpoint names, manifest last;
	// Removed lists the directories (of this attempt or of an earlier one) of those that save_total_limit gave up
	CheckpointDir string   `json:"checkpoint_dir,omitempty"`
	Removed       []string `json:"removed,omitempty"`

	// done: the adapter is on disk in AdapterDir, manifest last
	// failed: Error says why; the job cannot succeed by being tried again
	// log: Message is for the job's event list
	Message string `json:"message,omitempty"`
	Level   string `json:"level,omitempty"` // info, warn
	Error   *Error `json:"error,omitempty"`
}

// LongRows are lines of the files of a job, counted from 1.
type LongRows struct {
	MaxLength      int   `json:"max_length"` // tokens
	TrainDropped   []int `json:"train_dropped,omitempty"`
	TrainTruncated []int `json:"train_truncated,omitempty"`
	ValidDropped   []int `json:"valid_dropped,omitempty"`
	ValidTruncated []int `json:"valid_truncated,omitempty"`
}

// Types of TrainerEvent.
const (
	EventDataset    = "dataset"
	EventPlan       = "plan"
	EventProgress   = "progress"
	EventStep       = "step"
	EventEval       = "eval"
	EventMemory     = "memory"
	EventSaved      = "saved" // a resume state at Step is on disk
	EventCheckpoint = "checkpoint"
	EventLog        = "log"
	EventDone       = "done"
	EventFailed     = "failed"
)

// MemoryPlan is the layout that was chosen and what the job takes with it, in bytes.
type MemoryPlan struct {
	Device           string `json:"device"`   // cpu, or the GPU's name
	Layout           string `json:"layout"`   // exact, middle, low
	Forward          string `json:"forward"`  // storage of W
	Backward         string `json:"backward"` // storage of the transposed W
	WeightBytes      int64  `json:"weight_bytes"`
	AdapterBytes     int64  `json:"adapter_bytes"` // weights, gradients, moments
	ActivationBytes  int64  `json:"activation_bytes"`
	OverheadBytes    int64  `json:"overhead_bytes"` // process, data, device context
	TotalBytes       int64  `json:"total_bytes"`
	FreeBytes        int64  `json:"free_bytes"` // or the budget that the server granted
	MicroBatchTokens int    `json:"micro_batch_tokens"`
	Recompute        bool   `json:"recompute"` // activations of a layer are computed again in the backward pass
}

// TrainPlan is TrainOptions with every "auto" decided, and what they come to. It is part of the resume state.
type TrainPlan struct {
	Method            string   `json:"method"` // supervised, dpo
	R                 int      `json:"r"`
	LoraAlpha         float64  `json:"lora_alpha"`
	LoraDropout       float64  `json:"lora_dropout"`
	UseRSLoRA         bool     `json:"use_rslora"`
	TargetModules     []string `json:"target_modules"`
	LayersToTransform []int    `json:"layers_to_transform,omitempty"` // empty: all
	InitLoraWeights   string   `json:"init_lora_weights"`

	LearningRate    float64 `json:"learning_rate"`
	NumTrainEpochs  int     `json:"num_train_epochs"`
	BatchSize       int     `json:"batch_size"`
	WarmupSteps     int     `json:"warmup_steps"`
	LRScheduler     string  `json:"lr_scheduler_type"`
	MinLearningRate float64 `json:"min_learning_rate"` // of cosine_with_min_lr
	WeightDecay     float64 `json:"weight_decay"`
	AdamBeta1       float64 `json:"adam_beta1"`
	AdamBeta2       float64 `json:"adam_beta2"`
	AdamEpsilon     float64 `json:"adam_epsilon"`
	MaxGradNorm     float64 `json:"max_grad_norm"`
	TotalSteps      int     `json:"total_steps"`
	Seed            int64   `json:"seed"`

	MaxLength     int    `json:"max_length"`
	LongRows      string `json:"long_rows"`
	TrainOnAll    bool   `json:"train_on_all"`
	PrefixSharing bool   `json:"prefix_sharing"`

	Choices        []string `json:"choices,omitempty"`
	Beta           float64  `json:"beta,omitempty"`
	LossType       string   `json:"loss_type,omitempty"`
	LabelSmoothing float64  `json:"label_smoothing,omitempty"`

	EvalStrategy           string  `json:"eval_strategy"`
	EvalSteps              int     `json:"eval_steps,omitempty"`
	SaveStrategy           string  `json:"save_strategy"`
	SaveSteps              int     `json:"save_steps,omitempty"`
	SaveTotalLimit         int     `json:"save_total_limit"`
	LoggingSteps           int     `json:"logging_steps"`
	LoadBestModelAtEnd     bool    `json:"load_best_model_at_end"`
	MetricForBestModel     string  `json:"metric_for_best_model"`
	EarlyStoppingPatience  int     `json:"early_stopping_patience,omitempty"` // 0: never
	EarlyStoppingThreshold float64 `json:"early_stopping_threshold,omitempty"`

	Memory      MemoryPlan `json:"memory"`
	ResumedStep int        `json:"resumed_step"` // 0 for a fresh start
	// LearningRateMultiplier is LearningRate over the automatic rate, for OpenAI's hyperparameters object.
	LearningRateMultiplier float64 `json:"learning_rate_multiplier"`
}

// TrainerCommand is a later line of a trainer's standard input.
type TrainerCommand struct {
	Op string `json:"op"` // stop: abort the running micro-batch, save a resume state, exit with code 0
}
