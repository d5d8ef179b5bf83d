package wire

import (
	"encoding/json"
	"fmt"
)

// FineTuningJobRequest is the body of POST /v1/fine_tuning/jobs.
type FineTuningJobRequest struct {
	Model           string            `json:"model"`
	TrainingFile    string            `json:"training_file"`
	ValidationFile  *string           `json:"validation_file,omitempty"`
	Suffix          *string           `json:"suffix,omitempty"`
	Seed            *int64            `json:"seed,omitempty"`
	Hyperparameters *Hyperparameters  `json:"hyperparameters,omitempty"` // deprecated place
	Method          *FineTuningMethod `json:"method,omitempty"`
	Integrations    json.RawMessage   `json:"integrations,omitempty"`
	Metadata        map[string]string `json:"metadata,omitempty"`
	// Hone holds options of LoRA, the trainer and DPO under PEFT's, HF Trainer's and TRL's names, decoded strictly by the server.
	Hone json.RawMessage `json:"hone,omitempty"`
}

// FineTuningMethod selects how to tune: supervised or dpo.
type FineTuningMethod struct {
	Type       string            `json:"type"`
	Supervised *SupervisedMethod `json:"supervised,omitempty"`
	DPO        *DPOMethod        `json:"dpo,omitempty"`
}

// SupervisedMethod holds the hyper-parameters of supervised tuning.
type SupervisedMethod struct {
	Hyperparameters *Hyperparameters `json:"hyperparameters,omitempty"`
}

// DPOMethod holds the hyper-parameters of direct preference optimisation.
type DPOMethod struct {
	Hyperparameters *Hyperparameters `json:"hyperparameters,omitempty"`
}

// Hyperparameters are OpenAI's three, and DPO's beta; nil is absent, which means the same as "auto".
type Hyperparameters struct {
	BatchSize              *Auto[int]     `json:"batch_size,omitempty"`
	LearningRateMultiplier *Auto[float64] `json:"learning_rate_multiplier,omitempty"`
	NEpochs                *Auto[int]     `json:"n_epochs,omitempty"`
	Beta                   *Auto[float64] `json:"beta,omitempty"` // of dpo only
}

// Auto is a number or the word "auto", which is a nil Value.
type Auto[T int | float64] struct{ Value *T }

// Number returns an Auto that is v.
func Number[T int | float64](v T) *Auto[T] { return &Auto[T]{Value: &v} }

// MarshalJSON writes the number or "auto".
func (a Auto[T]) MarshalJSON() ([]byte, error) {
	if a.Value == nil {
		return []byte(`"auto"`), nil
	}
	return json.Marshal(*a.Value)
}

// UnmarshalJSON accepts a number and "auto".
func (a *Auto[T]) UnmarshalJSON(data []byte) error {
	if string(data) == `"auto"` {
		a.Value = nil
		return nil
	}
	v := new(T)
	if err := json.Unmarshal(data, v); err != nil {
		kind := "a number"
		if _, ok := any(*v).(int); ok {
			kind = "an integer"
		}
		return fmt.Errorf(`expected "auto" or %s, not %.40s`, kind, data)
	}
	a.Value = v
	return nil
}

// FineTuningJob is a job as the API shows it. Every field without omitempty is required by OpenAI's schema; the
// pointers are its nullable ones, null in a healthy or unfinished job.
type FineTuningJob struct {
	ID              string              `json:"id"`     // ftjob-...
	Object          string              `json:"object"` // fine_tuning.job
	CreatedAt       int64               `json:"created_at"`
	FinishedAt      *int64              `json:"finished_at"`
	Model           string              `json:"model"`
	FineTunedModel  *string             `json:"fine_tuned_model"`
	OrganizationID  string              `json:"organization_id"`
	Status          string              `json:"status"` // validating_files, queued, running, succeeded, failed, cancelled
	Hyperparameters Hyperparameters     `json:"hyperparameters"`
	Method          *FineTuningMethod   `json:"method,omitempty"`
	TrainingFile    string              `json:"training_file"`
	ValidationFile  *string             `json:"validation_file"`
	ResultFiles     []string            `json:"result_files"`
	TrainedTokens   *int64              `json:"trained_tokens"`
	Error           *FineTuningJobError `json:"error"`
	Seed            int64               `json:"seed"`
	EstimatedFinish *int64              `json:"estimated_finish"`
	Integrations    []struct{}          `json:"integrations"`
	Metadata        map[string]string   `json:"metadata,omitempty"`
	UserSuffix      *string             `json:"user_provided_suffix,omitempty"`
	Hone            *FineTuningDetails  `json:"hone,omitempty"`
}

// FineTuningJobError says why a job failed.
type FineTuningJobError struct {
	Code    string  `json:"code"`
	Message string  `json:"message"`
	Param   *string `json:"param"`
}

// FineTuningDetails is what OpenAI's job object has no fields for.
type FineTuningDetails struct {
	Attempt int `json:"attempt,omitempty"` // counts the times that the job was started
	// StartAdapter is the tuned model that training goes on from; the job's model is its base.
	StartAdapter string `json:"start_adapter,omitempty"`
	// Options are the `hone` object as requested, Plan every option as decided, once the trainer has decided.
	Options  json.RawMessage     `json:"options,omitempty"`
	Plan     json.RawMessage     `json:"plan,omitempty"`
	Progress *FineTuningProgress `json:"progress,omitempty"` // once the job has run
	Usage    *FineTuningUsage    `json:"usage,omitempty"`    // once the job has run
	// Paused says why a job that could run waits: requested, disk_full. Its status is queued, or validating_files.
	Paused string `json:"paused,omitempty"`
}

// FineTuningUsage is what a job has taken so far.
type FineTuningUsage struct {
	TrainedTokens int64   `json:"trained_tokens"`
	RunSeconds    float64 `json:"run_seconds"` // of all attempts
}

// FineTuningProgress says how far a job is. Losses are means over tokens, in nats; nil has not been measured.
type FineTuningProgress struct {
	Step            int      `json:"step"` // optimizer steps done
	TotalSteps      int      `json:"total_steps"`
	StepFraction    float64  `json:"step_fraction"` // of the step that runs now, in [0, 1)
	TokensPerSecond float64  `json:"tokens_per_second"`
	SecondsLeft     float64  `json:"seconds_left"`
	TrainLoss       *float64 `json:"train_loss"`
	ValidLoss       *float64 `json:"full_valid_loss"`
	ValidAccuracy   *float64 `json:"full_valid_mean_token_accuracy"`
	// ValidChoiceAccuracy is the share of validation questions that `hone predict` would answer right.
	ValidChoiceAccuracy *float64 `json:"valid_choice_accuracy,omitempty"`
}

// FineTuningDryRun answers POST /v1/fine_tuning/jobs/dry_run: what the job of the same request would do. Tokens are those of
// one epoch.
type FineTuningDryRun struct {
	Object         string           `json:"object"` // fine_tuning.job.dry_run
	Model          string           `json:"model"`  // the base model
	StartAdapter   string           `json:"start_adapter,omitempty"`
	Method         FineTuningMethod `json:"method"`
	TrainingFile   string           `json:"training_file"`
	ValidationFile *string          `json:"validation_file"`
	TrainRows      int              `json:"train_rows"` // that are left to train on
	ValidRows      int              `json:"valid_rows"`
	TrainTokens    int              `json:"train_tokens"`
	ValidTokens    int              `json:"valid_tokens"`
	SharedTokens   int              `json:"shared_tokens"` // of train_tokens, that are computed once for several rows
	TruncatedRows  int              `json:"truncated_rows"`
	DroppedRows    int              `json:"dropped_rows"`
	Options        json.RawMessage  `json:"options"` // as requested; what is not there was "auto"
	Plan           json.RawMessage  `json:"plan"`    // every option as decided, and the memory that the job takes
	Notes          []string         `json:"notes"`
}

// FineTuningJobEvent is one line of a job's log, newest first in lists. go-openai shows its users only the message,
// so numbers stand in the message too.
type FineTuningJobEvent struct {
	ID        string          `json:"id"`     // ftevent-...
	Object    string          `json:"object"` // fine_tuning.job.event
	CreatedAt int64           `json:"created_at"`
	Level     string          `json:"level"` // info, warn, error
	Message   string          `json:"message"`
	Type      string          `json:"type"` // message, metrics
	Data      json.RawMessage `json:"data"` // an object, {} for messages
}

// CheckpointPermission says that a project may use a checkpoint.
type CheckpointPermission struct {
	ID        string `json:"id"`     // cp_...
	Object    string `json:"object"` // checkpoint.permission
	CreatedAt int64  `json:"created_at"`
	ProjectID string `json:"project_id"`
}

// CheckpointPermissionRequest is the body of POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions.
type CheckpointPermissionRequest struct {
	ProjectIDs []string `json:"project_ids"`
}

// FineTuningJobCheckpoint is a servable state of a job before its end.
type FineTuningJobCheckpoint struct {
	ID             string          `json:"id"`     // ftckpt_...
	Object         string          `json:"object"` // fine_tuning.job.checkpoint
	CreatedAt      int64           `json:"created_at"`
	Model          string          `json:"fine_tuned_model_checkpoint"`
	StepNumber     int             `json:"step_number"`
	FineTuningJob  string          `json:"fine_tuning_job_id"`
	MetricsAtPoint json.RawMessage `json:"metrics"`
}
