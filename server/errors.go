package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"syscall"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/batch"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// statusClientGone is written to the log for a request whose client went away; nobody receives it.
const statusClientGone = 499

// Seconds after which a request that cannot be answered now is worth sending again.
const (
	overloadedRetry = 1
	stoppingRetry   = 5
)

// invalid is a 400 that blames the request's field param ("" if none).
func invalid(param, format string, args ...any) *wire.Error {
	e := &wire.Error{Status: http.StatusBadRequest, Type: wire.ErrorTypeInvalidRequest, Message: fmt.Sprintf(format, args...)}
	if param != "" {
		e.Param = &param
	}
	return e
}

// errorKinds maps errors to answers; the first row that matches counts. An error that no row matches is a 500 whose
// message tells the client nothing: the log has it.
var errorKinds = []struct {
	matches func(err error) bool
	status  int
	code    string // "" is null
	message string // "" is the error's own text
	retry   int    // seconds, of Retry-After; 0: none
}{
	{is(context.Canceled), statusClientGone, "", "the client closed the connection", 0},
	{is(context.DeadlineExceeded), http.StatusGatewayTimeout, "timeout", "", 0},
	{is(child.ErrStopping), http.StatusServiceUnavailable, "shutting_down", "the server is stopping; send the request again later", stoppingRetry},
	{is(finetune.ErrStopping), http.StatusServiceUnavailable, "shutting_down", "the server is stopping; send the request again later", stoppingRetry},
	{is(store.ErrKeyReused), http.StatusUnprocessableEntity, "idempotency_key_reused", "a request for something else had this Idempotency-Key; send what is new with a new key", 0},
	{is(store.ErrPickle), http.StatusUnsupportedMediaType, "unsupported_media_type", store.ErrPickle.Error(), 0},
	{is(finetune.ErrNotFound), http.StatusNotFound, "not_found", "", 0},
	{is(finetune.ErrUnknownModel), http.StatusNotFound, "model_not_found", "", 0},
	{is(adapters.ErrNotFound), http.StatusNotFound, "model_not_found", "", 0},
	{is(store.ErrNotFound), http.StatusNotFound, "not_found", "", 0},
	{as[*adapters.BaseMismatchError], http.StatusConflict, "base_model_changed", "", 0},
	{as[*adapters.DamagedError], http.StatusConflict, "adapter_damaged", "", 0},
	{as[*store.FileInUseError], http.StatusConflict, "file_in_use", "", 0},
	{as[*store.AdapterInUseError], http.StatusConflict, "model_in_use", "", 0},
	{as[*finetune.ConflictError], http.StatusConflict, "conflict", "", 0},
	{as[*batch.ConflictError], http.StatusConflict, "conflict", "", 0},
	{as[*store.ContentError], http.StatusInternalServerError, "file_damaged", "", 0},
	{as[*store.SpaceError], http.StatusInsufficientStorage, "insufficient_storage", "", 0},
	{is(syscall.ENOSPC), http.StatusInsufficientStorage, "insufficient_storage", "the disk of the data directory is full: free some space, or delete files, jobs or models that are not needed", 0},
	{is(syscall.EDQUOT), http.StatusInsufficientStorage, "insufficient_storage", "the quota of the data directory's disk is used up: delete files, jobs or models that are not needed", 0},
	{as[*child.ExitError], http.StatusInternalServerError, "runner_ended", "the process that computes this model ended unexpectedly; the next request starts it again, and the server's log says why", 0},
	{is(child.ErrEnded), http.StatusInternalServerError, "runner_ended", "the process that computes this model ended unexpectedly; the next request starts it again, and the server's log says why", 0},
}

func is(target error) func(error) bool { return func(err error) bool { return errors.Is(err, target) } }

func as[T error](err error) bool { return errors.As(err, new(T)) }

// errorFor turns any error into the one that the client gets.
func errorFor(err error) *wire.Error {
	if known := new(wire.Error); errors.As(err, &known) {
		return known
	}
	if bad := new(finetune.InvalidError); errors.As(err, &bad) {
		e := invalid(bad.Param, "%s", bad.Message)
		if bad.Code != "" {
			e.Code = &bad.Code
		}
		return e
	}
	if refused := new(child.Error); errors.As(err, &refused) {
		return refusal(refused)
	}
	if later := new(child.UnavailableError); errors.As(err, &later) {
		return unavailableNow(later)
	}
	for _, kind := range errorKinds {
		if !kind.matches(err) {
			continue
		}
		e := &wire.Error{Status: kind.status, Type: wire.ErrorTypeInvalidRequest, Message: kind.message, RetryAfter: kind.retry}
		if kind.status >= http.StatusInternalServerError {
			e.Type = wire.ErrorTypeServer
		}
		if kind.code != "" {
			e.Code = new(kind.code)
		}
		if e.Message == "" {
			e.Message = err.Error()
		}
		return e
	}
	return &wire.Error{Status: http.StatusInternalServerError, Type: wire.ErrorTypeServer, Message: "the server failed; its log has the details under this request's x-request-id"}
}

// unavailableReasons are the codes of what child.UnavailableError is for.
var unavailableReasons = []struct {
	reason error
	code   string
}{
	{child.ErrLoading, "model_loading"},
	{child.ErrNoMemory, "insufficient_memory"},
	{child.ErrBackOff, "model_unavailable"},
}

// unavailableNow is a 503 that says when to ask again.
func unavailableNow(err *child.UnavailableError) *wire.Error {
	e := &wire.Error{
		Status: http.StatusServiceUnavailable, Type: wire.ErrorTypeServer, Param: new("model"), Message: err.Message,
		RetryAfter: max(int(math.Ceil(err.RetryAfter.Seconds())), 1),
	}
	for _, r := range unavailableReasons {
		if errors.Is(err.Reason, r.reason) {
			e.Code = new(r.code)
		}
	}
	return e
}

// refusal turns what a runner says into an answer: its own failure is a 500, a full queue a 429, a model that does not fit
// a 503, all else is the request's fault.
func refusal(err *child.Error) *wire.Error {
	switch err.Code {
	case child.CodeInternal:
		return &wire.Error{Status: http.StatusInternalServerError, Type: wire.ErrorTypeServer, Message: err.Message}
	case child.CodeOverloaded:
		return &wire.Error{Status: http.StatusTooManyRequests, Type: wire.ErrorTypeRateLimit, Code: new("rate_limit_exceeded"), Message: err.Message, RetryAfter: overloadedRetry}
	case child.CodeInsufficientMemory:
		return &wire.Error{Status: http.StatusServiceUnavailable, Type: wire.ErrorTypeServer, Param: new("model"), Code: &err.Code, Message: err.Message}
	}
	e := invalid(err.Param, "%s", err.Message)
	switch err.Code {
	case child.CodeContextLength, child.CodeInvalidModel, child.CodeInvalidAdapter, child.CodeEndsEngine:
		e.Code = &err.Code
		if e.Param == nil && err.Code != child.CodeEndsEngine {
			param := "model"
			if err.Code == child.CodeContextLength {
				param = "messages"
			}
			e.Param = &param
		}
	}
	return e
}
