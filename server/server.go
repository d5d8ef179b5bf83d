// Package server is hone's HTTP API: it decodes a request, calls one method of the package that does the work, and
// encodes what it returns. It keeps no state of its own, and never loads a model.
//
//	s := server.New(server.Options{Generator: runners, Models: models, Adapters: registry, Jobs: jobs, Files: st})
//	http.ListenAndServe("127.0.0.1:8080", s.Handler())
//
// Paths, objects and errors are OpenAI's. Every handler returns an error, and Server.handle is the one place that logs
// it and writes its envelope. errors.go has the table from errors to answers, fields.go the fields that are refused.
package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

// Options are what the API works with. Generator, Models, Adapters, Jobs, Files and Batches are required.
type Options struct {
	Generator Generator
	Models    Models
	Adapters  Adapters
	Jobs      Jobs
	Files     Files
	Batches   Batches

	// AllowedHosts are names that the Host header may have beside loopback names and addresses; AnyHost allows all.
	AllowedHosts []string
	AnyHost      bool
	CORSOrigins  []string // of web pages that may use the API
	Keys         []Key    // none: no key is needed
	MaxBodyBytes int64    // of a JSON body; 0: 32 MiB
	// BodyTimeout is what a body may take beyond a second for each 4 KiB; 0: 30 seconds.
	BodyTimeout  time.Duration
	DefaultModel string // that GET /ready asks for; "": any

	// For /metrics, which leaves out what is nil.
	RunnerStatus func(ctx context.Context) []child.RunnerStatus
	JobStats     func(ctx context.Context) (finetune.Stats, error)

	Logger *slog.Logger     // nil drops the log
	Now    func() time.Time // nil: time.Now
}

// Server answers the API's requests. It is safe for concurrent use.
type Server struct {
	generator Generator
	models    Models
	adapters  Adapters
	jobs      Jobs
	files     Files
	batches   Batches

	computing   atomic.Int64 // users' requests that models compute
	drain       drain
	repeatables sync.Map    // keys of requests with an Idempotency-Key that are being answered
	batchEngine *gin.Engine // of requests of batches

	hosts        []string
	anyHost      bool
	corsOrigins  []string
	origin       *http.CrossOriginProtection
	keys         []Key
	maxBody      int64
	bodyTimeout  time.Duration
	defaultModel string
	metrics      *metrics
	logger       *slog.Logger
	now          func() time.Time
	engine       *gin.Engine
}

// New returns the server of opts.
func New(opts Options) *Server {
	s := &Server{
		models: opts.Models, adapters: opts.Adapters, jobs: opts.Jobs, files: opts.Files, batches: opts.Batches,
		hosts: opts.AllowedHosts, anyHost: opts.AnyHost, corsOrigins: opts.CORSOrigins, origin: http.NewCrossOriginProtection(),
		keys: opts.Keys, maxBody: cmp.Or(opts.MaxBodyBytes, maxBodyBytes), bodyTimeout: cmp.Or(opts.BodyTimeout, bodyTimeout),
		defaultModel: opts.DefaultModel, metrics: newMetrics(opts), logger: opts.Logger, now: opts.Now,
	}
	s.generator = measured{opts.Generator, s.metrics}
	for _, origin := range opts.CORSOrigins {
		if err := s.origin.AddTrustedOrigin(origin); err != nil {
			panic("an origin that the configuration let pass: " + err.Error())
		}
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	gin.SetMode(gin.ReleaseMode) // process-wide in gin; the other modes print routes to standard output
	s.engine = gin.New()
	// Routes are matched against the decoded path, and names of models, which may hold / and :, are path tails; so an id
	// arrives whole, escaped or not, and nothing is redirected.
	s.engine.RedirectTrailingSlash = false
	s.engine.HandleMethodNotAllowed = true
	s.engine.Use(s.observe, s.handle(s.guard), s.admit)
	s.route()
	s.batchEngine = s.inner()
	return s
}

// Handler returns the HTTP handler of all routes.
func (s *Server) Handler() http.Handler { return s.engine }

func (s *Server) route() {
	e := s.engine
	e.GET("/health", s.handle(s.health))
	e.GET("/openapi.json", s.handle(s.openAPI))
	e.GET("/ready", s.handle(s.ready))
	e.GET("/metrics", s.handle(s.showMetrics))
	e.GET("/debug/pprof/*name", s.handle(s.profile))
	v1 := e.Group("/v1")
	once := s.handle(s.idempotent)
	v1.POST("/chat/completions", s.compute, s.handle(s.chatCompletion))
	v1.POST("/completions", s.compute, s.handle(s.completion))
	v1.POST("/embeddings", s.compute, s.handle(s.embeddings))
	v1.POST("/decisions", s.compute, s.handle(s.decision))
	for _, g := range []gin.IRoutes{v1, e} { // vLLM has them outside of /v1
		g.POST("/tokenize", s.handle(s.tokenize))
		g.POST("/detokenize", s.handle(s.detokenize))
		g.GET("/tokenizer_info", s.handle(s.tokenizerInfo))
	}
	v1.GET("/models", s.handle(s.listModels))
	v1.GET("/models/*id", s.handle(s.getModel))
	v1.DELETE("/models/*id", s.handle(s.deleteModel))
	v1.POST("/files", once, s.handle(s.createFile))
	v1.GET("/files", s.handle(s.listFiles))
	v1.GET("/files/:id", s.handle(s.getFile))
	v1.GET("/files/:id/content", s.handle(s.fileContent))
	v1.DELETE("/files/:id", s.handle(s.deleteFile))
	v1.POST("/uploads", once, s.handle(s.createUpload))
	v1.POST("/uploads/:id/parts", once, s.handle(s.createPart))
	v1.POST("/uploads/:id/complete", once, s.handle(s.completeUpload))
	v1.POST("/uploads/:id/cancel", s.handle(s.cancelUpload))
	v1.POST("/batches", once, s.handle(s.createBatch))
	v1.GET("/batches", s.handle(s.listBatches))
	v1.GET("/batches/:id", s.handle(s.getBatch))
	v1.POST("/batches/:id/cancel", s.handle(s.cancelBatch))
	v1.POST("/fine_tuning/jobs", once, s.handle(s.createJob))
	v1.POST("/fine_tuning/jobs/dry_run", s.handle(s.dryRun))
	v1.GET("/fine_tuning/jobs", s.handle(s.listJobs))
	v1.GET("/fine_tuning/jobs/:id", s.handle(s.getJob))
	v1.POST("/fine_tuning/jobs/:id/cancel", s.handle(s.cancelJob))
	v1.POST("/fine_tuning/jobs/:id/pause", s.handle(s.pauseJob))
	v1.POST("/fine_tuning/jobs/:id/resume", s.handle(s.resumeJob))
	v1.GET("/fine_tuning/checkpoints/:checkpoint/permissions", s.handle(s.listPermissions))
	v1.POST("/fine_tuning/checkpoints/:checkpoint/permissions", s.handle(s.createPermission))
	v1.DELETE("/fine_tuning/checkpoints/:checkpoint/permissions/:permission", s.handle(s.deletePermission))
	v1.GET("/fine_tuning/jobs/:id/events", s.handle(s.listEvents))
	v1.GET("/fine_tuning/jobs/:id/checkpoints", s.handle(s.listCheckpoints))
	e.NoRoute(s.handle(func(c *gin.Context) error {
		return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Code: new("unknown_url"),
			Message: fmt.Sprintf("there is no %s %s; the API is under /v1", c.Request.Method, c.Request.URL.Path)}
	}))
	e.NoMethod(s.handle(func(c *gin.Context) error {
		return &wire.Error{Status: http.StatusMethodNotAllowed, Type: wire.ErrorTypeInvalidRequest, Code: new("method_not_allowed"),
			Message: fmt.Sprintf("%s does not take %s, but %s", c.Request.URL.Path, c.Request.Method, c.Writer.Header().Get("Allow"))}
	}))
}

// handle calls h, and logs and answers its error. It is the only place that does either.
func (s *Server) handle(h func(*gin.Context) error) gin.HandlerFunc {
	return func(c *gin.Context) {
		err := safely(c, h)
		if err == nil {
			return
		}
		c.Abort()
		answer := errorFor(err)
		log := s.requestLog(c).With("status", answer.Status, "error", err)
		c.Set(loggedField, true)
		switch {
		case answer.Status == statusClientGone:
			log.Debug("client gone")
			if c.Request.Context().Err() != nil {
				c.Status(statusClientGone) // for what is counted
				return
			}
		case answer.Status >= http.StatusInternalServerError:
			log.Error("request failed")
		default:
			log.Info("request refused")
		}
		if answer.RetryAfter > 0 && !c.Writer.Written() {
			c.Header("Retry-After", strconv.Itoa(answer.RetryAfter))
		}
		if c.Writer.Written() {
			// The status is sent: the stream tells it, and its end without [DONE].
			writeEvent(c, wire.ErrorResponse{Error: answer})
			return
		}
		_ = encode(c, answer.Status, wire.ErrorResponse{Error: answer}) // the client may be gone
	}
}

// safely turns a panic, our own bug, into an error with its stack. The client gets a plain 500.
func safely(c *gin.Context, h func(*gin.Context) error) (err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if abort, ok := p.(error); ok && errors.Is(abort, http.ErrAbortHandler) {
			panic(p)
		}
		err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
	}()
	return h(c)
}

// encode writes v as JSON without escaping <, > and &, which model output is full of.
func encode(c *gin.Context, status int, v any) error {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	c.Header("Content-Type", "application/json")
	c.Header("X-Content-Type-Options", "nosniff")
	c.Status(status)
	_, _ = c.Writer.Write(body.Bytes()) // a client that is gone cannot be told
	return nil
}
