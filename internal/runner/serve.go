package runner

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"

	"github.com/hone-llm/hone/internal/child"
)

// maxRequestBytes is the most that one request's JSON may have.
const maxRequestBytes = 64 << 20

// Handler returns the runner's HTTP interface, which serve uses over a unix socket:
//
//	POST /generate         child.GenerateRequest -> child.GenerateEvents, one a line, each sent at once
//	POST /adapters/unload  {"id": "..."}         -> {"unloaded": true}
//	GET  /status                                 -> Status
//
// A refusal before the first event has status 400, or 500 for a failure, and an event with Error as its body.
func (r *Runner) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /generate", r.handleGenerate)
	mux.HandleFunc("POST /adapters/unload", r.handleUnload)
	mux.HandleFunc("GET /status", r.handleStatus)
	return mux
}

func (r *Runner) handleGenerate(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	var request child.GenerateRequest
	if !readJSON(w, req, &request) {
		return
	}
	lines := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	started := false
	err := r.Generate(req.Context(), request, func(e child.GenerateEvent) error {
		started = true
		if err := lines.Encode(e); err != nil {
			return err
		}
		return flush.Flush()
	})
	if err == nil || req.Context().Err() != nil {
		return // done, or nobody listens
	}
	var refusal *child.Error
	if !errors.As(err, &refusal) {
		refusal = &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	if refusal.Code == child.CodeInternal {
		r.logger.Error("completion failed", slog.String("request_id", request.ID), slog.Any("error", err))
	}
	if !started {
		writeRefusal(w, refusal)
		return
	}
	_ = lines.Encode(child.GenerateEvent{Error: refusal}) // the stream ends without a finish reason if this fails too
}

func (r *Runner) handleUnload(w http.ResponseWriter, req *http.Request) {
	var request struct {
		ID string `json:"id"`
	}
	if !readJSON(w, req, &request) {
		return
	}
	writeJSON(w, map[string]bool{"unloaded": r.UnloadAdapter(request.ID)})
}

func (r *Runner) handleStatus(w http.ResponseWriter, req *http.Request) {
	status, err := r.Status(req.Context())
	if err != nil {
		writeRefusal(w, &child.Error{Code: child.CodeInternal, Message: err.Error()})
		return
	}
	writeJSON(w, status)
}

// readJSON decodes the request's body, or answers with what is wrong with it and returns false.
func readJSON(w http.ResponseWriter, req *http.Request, into any) bool {
	decoder := json.NewDecoder(http.MaxBytesReader(w, req.Body, maxRequestBytes))
	err := decoder.Decode(into)
	if err == nil {
		// Reading to the end lets the HTTP server notice when the client goes away.
		_, err = io.Copy(io.Discard, decoder.Buffered())
	}
	if err == nil {
		_, err = io.Copy(io.Discard, req.Body)
	}
	if err != nil {
		writeRefusal(w, &child.Error{Code: child.CodeInvalidRequest, Message: "request body: " + err.Error()})
	}
	return err == nil
}

func writeRefusal(w http.ResponseWriter, refusal *child.Error) {
	status := http.StatusBadRequest
	if refusal.Code == child.CodeInternal {
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(child.GenerateEvent{Error: refusal}) // the client is gone if this fails
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone if this fails
}

// requestsOf returns a context for an HTTP server's requests that ends with stop, and not with ctx: a graceful end lets
// requests finish.
func requestsOf(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	return context.WithCancelCause(context.WithoutCancel(ctx))
}
