// Package child is what serve and its children (runner and trainer) say to each other, and how serve starts,
// watches and ends them.
//
// A child is this same binary with the hidden command `runner` or `trainer`. Its first line of standard input is a
// JSON configuration (RunnerConfig, TrainerConfig); the pipe then stays open, and its end tells the child that the
// parent is gone. Standard output carries one JSON object a line (RunnerEvent, TrainerEvent); standard error is the log.
// The runner also serves HTTP on a unix socket: POST /generate with a GenerateRequest answers NDJSON GenerateEvents.
package child

import "github.com/hone-llm/hone/internal/wire"

// RunnerConfig is the first line of a runner's standard input.
type RunnerConfig struct {
	Socket        string `json:"socket"`         // path of the unix socket to listen on
	ModelDir      string `json:"model_dir"`      // models/<name>: base.gguf, tokenizer.json?, chat_template.jinja?
	ContextTokens int    `json:"context_tokens"` // longest prompt + completion of one sequence; 0 takes the model's own, at most 8192
	Sequences     int    `json:"sequences"`      // sequences decoded in one batch; 0 means 8
	Threads       int    `json:"threads"`        // 0 means all cores
}

// RunnerEvent is one line of a runner's standard output. The first is ready or failed.
type RunnerEvent struct {
	Type          string `json:"type"` // ready, failed
	ContextTokens int    `json:"context_tokens,omitempty"`
	Error         *Error `json:"error,omitempty"`
}

// Adapter names the LoRA adapter that a request is answered with.
type Adapter struct {
	ID   string `json:"id"`   // cache key in the runner
	Path string `json:"path"` // adapter.gguf
}

// GenerateRequest asks the runner for one completion. Exactly one of Messages and Prompt is set.
type GenerateRequest struct {
	ID          string         `json:"id"`
	Adapter     *Adapter       `json:"adapter,omitempty"`
	Messages    []wire.Message `json:"messages,omitempty"`
	Prompt      *string        `json:"prompt,omitempty"` // plain completion: no template
	MaxTokens   int            `json:"max_tokens"`       // 0: until the context is full
	Temperature float64        `json:"temperature"`      // 0 is greedy
	TopP        float64        `json:"top_p"`            // 1 keeps all
	Seed        *int64         `json:"seed,omitempty"`
	Stop        []string       `json:"stop,omitempty"`
	LogProbs    bool           `json:"logprobs,omitempty"`
	TopLogProbs int            `json:"top_logprobs,omitempty"`
	// Choices constrains the completion to be exactly one of these strings. Each token is chosen, greedily or by
	// Temperature, among those that go on with a choice as the tokenizer writes it, and its log-probability is renormalised over
	// them. So the greedy answer is the likeliest choice where each is one token (A, B, C, D);
	// of longer ones, it is the one that the likeliest token leads to at each position, which is not always the likeliest.
	Choices []string `json:"choices,omitempty"`
}

// GenerateEvent is one line of the answer to POST /generate: text events, then one with FinishReason or Error.
type GenerateEvent struct {
	Text         string         `json:"text,omitempty"`
	LogProbs     []TokenLogProb `json:"logprobs,omitempty"`      // of the tokens of Text
	FinishReason string         `json:"finish_reason,omitempty"` // stop, length
	Usage        *Usage         `json:"usage,omitempty"`         // with FinishReason
	Error        *Error         `json:"error,omitempty"`
}

// TokenLogProb is a token's piece, its log-probability (natural logarithm) and the most likely alternatives.
type TokenLogProb struct {
	Token   string         `json:"token"`
	Bytes   []byte         `json:"bytes"` // the piece; JSON base64
	LogProb float64        `json:"logprob"`
	Top     []TokenLogProb `json:"top,omitempty"`
}

// Usage counts tokens; CachedTokens of the prompt were found in the prefix cache.
type Usage struct {
	PromptTokens     int `json:"prompt_tokens"`
	CompletionTokens int `json:"completion_tokens"`
	CachedTokens     int `json:"cached_tokens"`
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
)

// TrainerConfig is the first line of a trainer's standard input: one attempt at one job.
type TrainerConfig struct {
	JobID          string       `json:"job_id"`
	Attempt        int          `json:"attempt"`
	ModelDir       string       `json:"model_dir"` // models/<name> of the base model
	BaseModel      string       `json:"base_model"`
	BaseDigest     string       `json:"base_digest"`     // sha256 of base.gguf, hex
	TrainingFile   string       `json:"training_file"`   // path of the JSONL
	ValidationFile string       `json:"validation_file"` // "" if none
	Dir            string       `json:"dir"`             // jobs/<id>/a<attempt>: resume states are written here
	ResumeFrom     []string     `json:"resume_from"`     // directories of earlier attempts, newest first; the first valid resume state in them is taken
	AdapterDir     string       `json:"adapter_dir"`     // where the finished adapter goes: adapter.gguf, PEFT copy, manifest.json last
	AdapterID      string       `json:"adapter_id"`
	AdapterName    string       `json:"adapter_name"` // ft:<base>:local:<suffix>:<id>
	Seed           int64        `json:"seed"`
	Options        TrainOptions `json:"options"`
	Threads        int          `json:"threads"` // 0 means all cores
}

// TrainOptions are the hyper-parameters of a job as requested; nil means "auto". Names are PEFT's LoraConfig's and
// HF TrainingArguments'; OpenAI's n_epochs, batch_size and learning_rate_multiplier are translated before.
type TrainOptions struct {
	R                      *int     `json:"r,omitempty"`              // auto: 16
	LoraAlpha              *float64 `json:"lora_alpha,omitempty"`     // auto: 2 r
	LoraDropout            *float64 `json:"lora_dropout,omitempty"`   // auto: 0.05
	UseRSLoRA              *bool    `json:"use_rslora,omitempty"`     // auto: false
	TargetModules          []string `json:"target_modules,omitempty"` // auto: all seven; "all-linear" is expanded by the trainer
	LearningRate           *float64 `json:"learning_rate,omitempty"`  // auto: by model size
	LearningRateMultiplier *float64 `json:"learning_rate_multiplier,omitempty"`
	NumTrainEpochs         *int     `json:"num_train_epochs,omitempty"`
	BatchSize              *int     `json:"batch_size,omitempty"` // examples per optimizer step
	WarmupRatio            *float64 `json:"warmup_ratio,omitempty"`
	WarmupSteps            *int     `json:"warmup_steps,omitempty"`
	LRSchedulerType        *string  `json:"lr_scheduler_type,omitempty"` // cosine (auto), linear, constant
	WeightDecay            *float64 `json:"weight_decay,omitempty"`      // auto: 0
	AdamBeta1              *float64 `json:"adam_beta1,omitempty"`
	AdamBeta2              *float64 `json:"adam_beta2,omitempty"`
	AdamEpsilon            *float64 `json:"adam_epsilon,omitempty"`
	MaxGradNorm            *float64 `json:"max_grad_norm,omitempty"` // auto: 1; 0 turns clipping off
	MaxLength              *int     `json:"max_length,omitempty"`    // auto: min(model context, 2048); longer rows are dropped and counted
	MaxSteps               *int     `json:"max_steps,omitempty"`
	SaveMinutes            *float64 `json:"save_minutes,omitempty"`      // auto: 5; resume state also at every epoch end
	QuestionTemplate       *string  `json:"question_template,omitempty"` // recorded in the adapter's manifest, for `hone predict`
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

	// eval: the whole validation file, at an epoch's end
	Epoch         int     `json:"epoch,omitempty"`
	ValidLoss     float64 `json:"full_valid_loss,omitempty"`
	ValidAccuracy float64 `json:"full_valid_mean_token_accuracy,omitempty"`

	// done: the adapter is on disk in AdapterDir, manifest last
	// failed: Error says why; the job cannot succeed by being tried again
	// log: Message is for the job's event list
	Message string `json:"message,omitempty"`
	Level   string `json:"level,omitempty"` // info, warn
	Error   *Error `json:"error,omitempty"`
}

// Types of TrainerEvent.
const (
	EventDataset  = "dataset"
	EventPlan     = "plan"
	EventProgress = "progress"
	EventStep     = "step"
	EventEval     = "eval"
	EventSaved    = "saved" // a resume state at Step is on disk
	EventLog      = "log"
	EventDone     = "done"
	EventFailed   = "failed"
)

// TrainPlan is TrainOptions with every "auto" decided, and what they come to.
type TrainPlan struct {
	R              int      `json:"r"`
	LoraAlpha      float64  `json:"lora_alpha"`
	LoraDropout    float64  `json:"lora_dropout"`
	UseRSLoRA      bool     `json:"use_rslora"`
	TargetModules  []string `json:"target_modules"`
	LearningRate   float64  `json:"learning_rate"`
	NumTrainEpochs int      `json:"num_train_epochs"`
	BatchSize      int      `json:"batch_size"`
	WarmupSteps    int      `json:"warmup_steps"`
	LRScheduler    string   `json:"lr_scheduler_type"`
	WeightDecay    float64  `json:"weight_decay"`
	AdamBeta1      float64  `json:"adam_beta1"`
	AdamBeta2      float64  `json:"adam_beta2"`
	AdamEpsilon    float64  `json:"adam_epsilon"`
	MaxGradNorm    float64  `json:"max_grad_norm"`
	MaxLength      int      `json:"max_length"`
	TotalSteps     int      `json:"total_steps"`
	Seed           int64    `json:"seed"`
	ResumedStep    int      `json:"resumed_step"` // 0 for a fresh start
	// LearningRateMultiplier is LearningRate over the automatic rate, for OpenAI's hyperparameters object.
	LearningRateMultiplier float64 `json:"learning_rate_multiplier"`
}

// TrainerCommand is a later line of a trainer's standard input.
type TrainerCommand struct {
	Op string `json:"op"` // stop: abort the running micro-batch, save a resume state, exit with code 0
}
