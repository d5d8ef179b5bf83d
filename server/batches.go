package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/internal/batch"
	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// Batches are files of requests that are answered one by one; batch.Batches implements it. An unknown id is store.ErrNotFound.
type Batches interface {
	Create(ctx context.Context, spec batch.Spec) (store.Batch, error) // *batch.InvalidError
	Get(ctx context.Context, id string) (store.Batch, error)
	List(ctx context.Context, after string, limit int) (batches []store.Batch, more bool, err error)
	Cancel(ctx context.Context, id string) (store.Batch, error) // *batch.ConflictError
}

// createBatch answers POST /v1/batches.
func (s *Server) createBatch(c *gin.Context) error {
	var req wire.BatchRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	if req.InputFileID == "" {
		return invalid("input_file_id", "input_file_id is required: the id of a file that was uploaded with the purpose %s", batch.Purpose)
	}
	lifetime, err := lifetimeOf("output_expires_after", req.OutputExpiresAfter)
	if err != nil {
		return err
	}
	ctx, done, err := s.once(c, s.showBatch)
	if done || err != nil {
		return err
	}
	row, err := s.batches.Create(ctx, batch.Spec{
		InputFile: req.InputFileID, Endpoint: req.Endpoint, Window: req.CompletionWindow, Metadata: req.Metadata, OutputLifetime: lifetime,
	})
	if refused := new(batch.InvalidError); errors.As(err, &refused) {
		return invalid(refused.Param, "%s", refused.Message)
	}
	if err != nil {
		return err
	}
	return encode(c, http.StatusOK, batchToWire(row))
}

func (s *Server) listBatches(c *gin.Context) error {
	limit, err := limitOf(c, 20, 100)
	if err != nil {
		return err
	}
	batches, more, err := s.batches.List(c.Request.Context(), c.Query("after"), limit)
	if err != nil {
		return afterError(err, c.Query("after"))
	}
	list := []wire.Batch{}
	for _, row := range batches {
		list = append(list, batchToWire(row))
	}
	return encode(c, http.StatusOK, page(list, more, func(b wire.Batch) string { return b.ID }))
}

func (s *Server) getBatch(c *gin.Context) error { return s.showBatch(c, c.Param("id")) }

func (s *Server) showBatch(c *gin.Context, id string) error {
	row, err := s.batches.Get(c.Request.Context(), id)
	if err != nil {
		return unknownBatch(err, id)
	}
	return encode(c, http.StatusOK, batchToWire(row))
}

func (s *Server) cancelBatch(c *gin.Context) error {
	row, err := s.batches.Cancel(c.Request.Context(), c.Param("id"))
	if err != nil {
		return unknownBatch(err, c.Param("id"))
	}
	return encode(c, http.StatusOK, batchToWire(row))
}

func unknownBatch(err error, id string) error {
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Param: new("id"), Code: new("not_found"),
		Message: fmt.Sprintf("the batch %q does not exist", id)}
}

func batchToWire(b store.Batch) wire.Batch {
	shown := wire.Batch{
		ID: b.ID, Object: "batch", Endpoint: b.Endpoint, Model: b.Model, InputFileID: b.InputFile, CompletionWindow: b.Window, Status: b.Status,
		OutputFileID: unlessZero(b.OutputFile), ErrorFileID: unlessZero(b.ErrorFile), CreatedAt: b.CreatedAt, InProgressAt: unlessZero(b.InProgressAt),
		ExpiresAt: b.ExpiresAt, FinalizingAt: unlessZero(b.FinalizingAt), CompletedAt: unlessZero(b.CompletedAt), FailedAt: unlessZero(b.FailedAt),
		ExpiredAt: unlessZero(b.ExpiredAt), CancellingAt: unlessZero(b.CancellingAt), CancelledAt: unlessZero(b.CancelledAt),
		RequestCounts: wire.BatchCounts{Total: b.Total, Completed: b.Completed, Failed: b.Failed}, Metadata: b.Metadata,
	}
	if len(b.Errors) > 0 {
		shown.Errors = &wire.BatchErrors{Object: "list"}
		for _, e := range b.Errors {
			shown.Errors.Data = append(shown.Errors.Data, wire.BatchError{Code: e.Code, Message: e.Message, Param: unlessZero(e.Param), Line: unlessZero(e.Line)})
		}
	}
	if b.Completed > 0 {
		u := &wire.BatchUsage{InputTokens: b.Usage.PromptTokens, OutputTokens: b.Usage.CompletionTokens, TotalTokens: b.Usage.PromptTokens + b.Usage.CompletionTokens}
		u.InputTokensDetails.CachedTokens, u.OutputTokensDetails.ReasoningTokens = b.Usage.CachedTokens, b.Usage.ReasoningTokens
		shown.Usage = u
	}
	return shown
}

// batchClient stands in place of an address for the requests of batches, which are one client of the fair queue.
const batchClient = "batch"

// ofBatch tells whether a request is one of a batch, which yields to those of users.
func ofBatch(r *http.Request) bool { return r.RemoteAddr == batchClient }

// inner answers requests of batches: they were let in when the batch was created, and nothing of them waits at the door.
func (s *Server) inner() *gin.Engine {
	e := gin.New()
	e.Use(func(c *gin.Context) { c.Header(requestIDHeader, newRequestID()) })
	e.POST("/v1/chat/completions", s.handle(s.chatCompletion))
	e.POST("/v1/completions", s.handle(s.completion))
	e.POST("/v1/embeddings", s.handle(s.embeddings))
	return e
}

// Answer implements batch.API: the handlers of the API answer.
func (s *Server) Answer(ctx context.Context, path string, body []byte) batch.Answer {
	// Whoever breaks a batch off is, for its requests, a client that goes away; the cause is the batch's own.
	asking, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	req, err := http.NewRequestWithContext(asking, http.MethodPost, path, bytes.NewReader(body))
	if err != nil {
		panic(fmt.Sprintf("a request to %s: %v", path, err)) // a path of ours
	}
	req.Header.Set("Content-Type", "application/json")
	req.RemoteAddr = batchClient
	w := &answerWriter{header: http.Header{}, status: http.StatusOK}
	s.batchEngine.ServeHTTP(w, req)
	seconds, _ := strconv.Atoi(w.header.Get("Retry-After"))
	return batch.Answer{Status: w.status, RequestID: w.header.Get(requestIDHeader), RetryAfter: time.Duration(seconds) * time.Second, Body: w.body.Bytes()}
}

// Busy implements batch.API.
func (s *Server) Busy() bool { return s.computing.Load() > 0 }

// compute counts a user's request that a model computes.
func (s *Server) compute(c *gin.Context) {
	s.computing.Add(1)
	defer s.computing.Add(-1)
	c.Next()
}

// answerWriter keeps an answer.
type answerWriter struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (w *answerWriter) Header() http.Header         { return w.header }
func (w *answerWriter) WriteHeader(status int)      { w.status = status }
func (w *answerWriter) Write(p []byte) (int, error) { return w.body.Write(p) }
