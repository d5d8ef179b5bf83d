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
//	POST /embed            child.EmbedRequest    -> child.EmbedResponse
//	POST /tokenize         child.TokenizeRequest -> child.TokenizeResponse
//	POST /adapters/unload  {"id": "..."}         -> {"unloaded": true}
//	GET  /status                                 -> Status
//
// A refusal before the first event has status 400, 429 where the queue is full, or 500 for a failure, and an event with
// Error as its body.
func (r *Runner) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /generate", r.handleGenerate)
	mux.HandleFunc("POST /embed", r.handleEmbed)
	mux.HandleFunc("POST /tokenize", r.handleTokenize)
	mux.HandleFunc("POST /adapters/unload", r.handleUnload)
	mux.HandleFunc("GET /status", r.handleStatus)
	return mux
}

func (r *Runner) handleGenerate(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	var request child.GenerateRequest
	if !r.read(w, req, &request) {
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
	refusal := r.refusal(request.ID, err)
	if !started {
		writeRefusal(w, refusal)
		return
	}
	_ = lines.Encode(child.GenerateEvent{Error: refusal}) // the stream ends without a finish reason if this fails too
}

func (r *Runner) handleEmbed(w http.ResponseWriter, req *http.Request) {
	var request child.EmbedRequest
	if !r.read(w, req, &request) {
		return
	}
	response, err := r.Embed(req.Context(), request)
	r.answer(w, req, request.ID, response, err)
}

func (r *Runner) handleTokenize(w http.ResponseWriter, req *http.Request) {
	var request child.TokenizeRequest
	if !readJSON(w, req, &request) {
		return
	}
	response, err := r.Tokenize(req.Context(), request)
	r.answer(w, req, "", response, err)
}

func (r *Runner) answer(w http.ResponseWriter, req *http.Request, id string, response any, err error) {
	switch {
	case err == nil:
		writeJSON(w, response)
	case req.Context().Err() == nil:
		writeRefusal(w, r.refusal(id, err))
	}
}

// refusal is the error as the server is told it; what is not the request's fault is logged.
func (r *Runner) refusal(id string, err error) *child.Error {
	var refusal *child.Error
	if !errors.As(err, &refusal) {
		refusal = &child.Error{Code: child.CodeInternal, Message: err.Error()}
	}
	if refusal.Code == child.CodeInternal {
		r.logger.Error("request failed", slog.String("request_id", id), slog.Any("error", err))
	}
	return refusal
}

// read is readJSON for a request that takes a place: a full queue answers before the body takes memory.
func (r *Runner) read(w http.ResponseWriter, req *http.Request, into any) bool {
	if r.places.Load() <= 0 {
		writeRefusal(w, r.refusal("", r.overloaded()))
		return false
	}
	return readJSON(w, req, into)
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
	switch refusal.Code {
	case child.CodeInternal:
		status = http.StatusInternalServerError
	case child.CodeOverloaded:
		status = http.StatusTooManyRequests
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
