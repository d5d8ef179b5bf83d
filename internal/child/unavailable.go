package child

import (
	"errors"
	"time"
)

// Reasons of an UnavailableError.
var (
	ErrLoading  = errors.New("the model is loading")
	ErrNoMemory = errors.New("no memory for the model now")
	ErrBackOff  = errors.New("the model's runner does not start")
)

// UnavailableError says that a model cannot answer now and may later: 503 with Retry-After.
type UnavailableError struct {
	Reason     error // ErrLoading, ErrNoMemory, ErrBackOff
	Message    string
	RetryAfter time.Duration // when to ask again
}

func (e *UnavailableError) Error() string { return e.Message }

// Unwrap makes errors.Is(err, ErrLoading) true of what has that reason.
func (e *UnavailableError) Unwrap() error { return e.Reason }
