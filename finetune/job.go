package finetune

import (
	"encoding/json"

	"github.com/hone-llm/hone/internal/child"
)

// Spec asks for a job. Zero values are the documented defaults.
type Spec struct {
	Model          string // a base model, or ft:...: then training goes on from that adapter, on its base model
	TrainingFile   string // file id; purpose fine-tune
	ValidationFile string // file id, or ""
	Suffix         string // 1 to 64 characters of the tuned model's name, or ""
	Seed           *int64 // 0 to 2147483647; nil draws one
	Options        child.TrainOptions
	Metadata       map[string]string // at most 16 pairs, keys to 64 and values to 512 characters
	MethodType     string            // Supervised ("" too) or DPO
	// Requested are OpenAI's hyper-parameters as sent. What Options leaves nil is taken from here.
	Requested Hyperparameters
}

// Hyperparameters are OpenAI's. nil is "auto".
type Hyperparameters struct {
	NEpochs                *int     `json:"n_epochs,omitempty"`
	BatchSize              *int     `json:"batch_size,omitempty"`
	LearningRateMultiplier *float64 `json:"learning_rate_multiplier,omitempty"`
	Beta                   *float64 `json:"beta,omitempty"` // of DPO
}

// Status is the state of a job, in OpenAI's words.
type Status string

// The states, in the order of a job's life. The last three are final. A paused job is queued (or validating_files): OpenAI's
// enum has no word for it.
const (
	ValidatingFiles Status = "validating_files"
	Queued          Status = "queued"
	Running         Status = "running"
	Succeeded       Status = "succeeded"
	Failed          Status = "failed"
	Cancelled       Status = "cancelled"
)

// Final reports whether a job in this state never changes again.
func (s Status) Final() bool { return s == Succeeded || s == Failed || s == Cancelled }

// moves lists the states that each state may go to.
var moves = map[Status][]Status{
	ValidatingFiles: {Queued, Failed, Cancelled},
	Queued:          {Running, Failed, Cancelled},
	Running:         {Running, Queued, Succeeded, Failed, Cancelled},
}

// Reasons why a job that could run waits.
const (
	PausedByRequest = "requested" // until Resume
	PausedForSpace  = "disk_full" // until there is room on the disk, or Resume
)

// Job is a job as it stands: its row, and for a running one the trainer's latest progress.
type Job struct {
	ID             string // ftjob-...
	CreatedAt      int64  // Unix seconds
	FinishedAt     int64  // Unix seconds; 0 until the state is final
	Model          string // the base model
	StartAdapter   string // ft:...; "" if training began anew
	FineTunedModel string // ft:...; "" until it succeeded
	Status         Status
	Error          *JobError // of a failed job
	MethodType     string
	// Hyperparameters are the decided values once there is a Plan, before that the requested ones (nil is "auto").
	Hyperparameters Hyperparameters
	Requested       Hyperparameters
	Options         child.TrainOptions // as requested
	Plan            *child.TrainPlan   // every option as decided; nil until the trainer has decided
	Seed            int64
	TrainingFile    string
	ValidationFile  string   // "" if none
	ResultFiles     []string // file ids, never nil
	TrainedTokens   int64    // so far
	Metadata        map[string]string
	Suffix          string   // as sent
	EstimatedFinish int64    // Unix seconds; 0 if not known
	Progress        Progress // of the latest attempt
	Attempt         int      // 0 until it first ran
	Paused          string   // PausedByRequest, PausedForSpace, or "" if it is not
	RunSeconds      float64  // time of all its attempts, up to their last event
}

// JobError is why a job failed: trying again would not help.
type JobError struct {
	Code    string
	Message string
	Param   string // training_file, validation_file, or ""
}

func (e *JobError) Error() string { return e.Message }

// Progress is how far a job is. Losses are means over tokens, in nats; they are nil until first measured.
type Progress struct {
	Step            int     // optimizer steps done
	TotalSteps      int     // 0 until planned
	Fraction        float64 // of the current step, [0, 1)
	TokensPerSecond float64
	SecondsLeft     float64
	TrainLoss       *float64
	ValidLoss       *float64
	ValidAccuracy   *float64
	// ValidChoiceAccuracy is the share of validation questions that a predictor would answer right, where that is known.
	ValidChoiceAccuracy *float64
}

// Event is one entry of a job's log.
type Event struct {
	ID        string // ftevent-...
	CreatedAt int64  // Unix seconds
	Level     string // info, warn, error
	Message   string
	Type      string          // message, metrics
	Data      json.RawMessage // an object; metrics have step, train_loss, ...; nil for a message
}

// Checkpoint is a servable adapter of a job at an earlier step.
type Checkpoint struct {
	ID         string // ftckpt_...
	CreatedAt  int64  // Unix seconds
	Model      string // ft:...:ckpt-step-N
	StepNumber int
	JobID      string
	Metrics    json.RawMessage // as in the events of that step
}
