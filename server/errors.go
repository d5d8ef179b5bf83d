package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// statusClientGone is written to the log for a request whose client went away; nobody receives it.
const statusClientGone = 499

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
}{
	{is(context.Canceled), statusClientGone, "", "the client closed the connection"},
	{is(context.DeadlineExceeded), http.StatusGatewayTimeout, "timeout", ""},
	{is(child.ErrStopping), http.StatusServiceUnavailable, "shutting_down", "the server is stopping; send the request again later"},
	{is(finetune.ErrStopping), http.StatusServiceUnavailable, "shutting_down", "the server is stopping; send the request again later"},
	{is(finetune.ErrNotFound), http.StatusNotFound, "not_found", ""},
	{is(finetune.ErrUnknownModel), http.StatusNotFound, "model_not_found", ""},
	{is(adapters.ErrNotFound), http.StatusNotFound, "model_not_found", ""},
	{is(store.ErrNotFound), http.StatusNotFound, "not_found", ""},
	{as[*adapters.BaseMismatchError], http.StatusConflict, "base_model_changed", ""},
	{as[*store.FileInUseError], http.StatusConflict, "file_in_use", ""},
	{as[*store.AdapterInUseError], http.StatusConflict, "model_in_use", ""},
	{as[*finetune.ConflictError], http.StatusConflict, "conflict", ""},
	{as[*child.ExitError], http.StatusInternalServerError, "runner_ended", "the process that computes this model ended unexpectedly; the next request starts it again, and the server's log says why"},
	{is(child.ErrEnded), http.StatusInternalServerError, "runner_ended", "the process that computes this model ended unexpectedly; the next request starts it again, and the server's log says why"},
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
	for _, kind := range errorKinds {
		if !kind.matches(err) {
			continue
		}
		e := &wire.Error{Status: kind.status, Type: wire.ErrorTypeInvalidRequest, Message: kind.message}
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

// refusal turns what a runner says into an answer: its own failure is a 500, all else is the request's fault.
func refusal(err *child.Error) *wire.Error {
	if err.Code == child.CodeInternal {
		return &wire.Error{Status: http.StatusInternalServerError, Type: wire.ErrorTypeServer, Message: err.Message}
	}
	e := invalid(err.Param, "%s", err.Message)
	switch err.Code {
	case child.CodeContextLength, child.CodeInvalidModel, child.CodeInvalidAdapter:
		e.Code = &err.Code
		if e.Param == nil {
			param := "model"
			if err.Code == child.CodeContextLength {
				param = "messages"
			}
			e.Param = &param
		}
	}
	return e
}
