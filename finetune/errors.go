package finetune

import (
	"errors"
	"fmt"
)

var (
	// ErrNotFound is returned for a job id that does not exist.
	ErrNotFound = errors.New("no such fine-tuning job")
	// ErrUnknownModel is what Models.Base returns, wrapped or not, for a name it does not know.
	ErrUnknownModel = errors.New("no such base model")
	// ErrStopping is the cause with which a running attempt is ended when the server stops: it saves its state.
	ErrStopping = errors.New("the server is stopping")
	// ErrCancelled is the cause with which a running attempt is ended when its job is cancelled.
	ErrCancelled = errors.New("the job was cancelled")
	// ErrPaused is the cause with which a running attempt is ended when its job is paused: it saves its state.
	ErrPaused = errors.New("the job was paused")
)

// InvalidError is a request that can never work. Param is the request's field, in dots: hyperparameters.n_epochs.
type InvalidError struct {
	Param   string
	Message string
	Code    string // OpenAI's error code, or ""
}

func (e *InvalidError) Error() string { return e.Message }

func invalid(param, code, format string, args ...any) *InvalidError {
	return &InvalidError{Param: param, Code: code, Message: fmt.Sprintf(format, args...)}
}

// ConflictError is a request that the job's state does not allow: cancelling a finished one.
type ConflictError struct {
	ID      string
	Status  Status
	Message string
}

func (e *ConflictError) Error() string { return e.Message }
