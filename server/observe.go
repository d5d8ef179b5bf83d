package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/pprof" // #nosec G108 -- its init adds to http.DefaultServeMux, which nothing serves
	profiles "runtime/pprof"
	"strings"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/wire"
)

const requestIDHeader = "X-Request-Id"

// Fields of gin's context.
const (
	loggedField = "logged" // handle has logged how the request ended
	jobField    = "job_id" // of a job that the request made or asks for
)

// requestID takes the client's own id, if it may stand in a log, so that a proxy's line and ours can be joined.
func requestID(r *http.Request) string {
	id := r.Header.Get(requestIDHeader)
	if id != "" && len(id) <= 64 && !strings.ContainsFunc(id, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.')
	}) {
		return id
	}
	return newRequestID()
}

func newRequestID() string { return newID("req_") }

// observe names the request, counts it, and logs one that succeeded: handle logs the others, with their errors. Looking at
// things is logged as debug, since clients that wait do it every second.
func (s *Server) observe(c *gin.Context) {
	c.Header(requestIDHeader, requestID(c.Request))
	began := time.Now()
	s.metrics.inFlight.Inc()
	bodyDone := s.timeBody(c)
	defer func() {
		bodyDone()
		s.metrics.inFlight.Dec()
		took := time.Since(began)
		status := c.Writer.Status()
		s.metrics.request(c.FullPath(), c.Request.Method, status, took)
		if c.GetBool(loggedField) {
			return
		}
		level := slog.LevelInfo
		if c.Request.Method == http.MethodGet || c.Request.Method == http.MethodOptions {
			level = slog.LevelDebug
		}
		s.requestLog(c).Log(c.Request.Context(), level, "request", "status", status, "bytes", max(0, c.Writer.Size()), "took", took.Round(10*time.Microsecond))
	}()
	c.Next()
}

// requestLog is a log whose lines say which request they are of. Headers and queries are not among that: they may hold keys.
func (s *Server) requestLog(c *gin.Context) *slog.Logger {
	log := s.logger.With("request_id", c.Writer.Header().Get(requestIDHeader), "method", c.Request.Method, "path", c.Request.URL.Path,
		"remote", c.Request.RemoteAddr)
	if key := keyIn(c); key != nil {
		log = log.With("key", key.Name)
	}
	job := c.GetString(jobField)
	if strings.HasPrefix(c.FullPath(), "/v1/fine_tuning/jobs/:id") {
		job = c.Param("id")
	}
	if job != "" {
		log = log.With("job_id", job)
	}
	return log
}

// health answers GET /health: that the server is there, and how it stands with the base models that were asked for.
func (s *Server) health(c *gin.Context) error {
	answer := healthAnswer{Status: "ok"}
	if s.trusted(c) {
		if answer.Models = s.generator.Models(); answer.Models == nil {
			answer.Models = []child.ModelState{}
		}
	}
	return encode(c, http.StatusOK, answer)
}

// ready answers GET /ready: 200 if the default model, or where there is none any model, can answer. It may have to be loaded
// for that: an idle model leaves the memory. A server that drains is not ready.
func (s *Server) ready(c *gin.Context) error {
	notReady := func(format string, args ...any) error {
		message := "no model can answer now"
		if s.trusted(c) {
			message = fmt.Sprintf(format, args...)
		}
		return &wire.Error{Status: http.StatusServiceUnavailable, Type: wire.ErrorTypeServer, Code: new("not_ready"), Message: message, RetryAfter: stoppingRetry}
	}
	if s.drain.begun() {
		return &wire.Error{Status: http.StatusServiceUnavailable, Type: wire.ErrorTypeServer, Code: new("shutting_down"),
			Message: "draining: the server finishes the answers in progress and stops", RetryAfter: stoppingRetry}
	}
	ctx := c.Request.Context()
	var names []string
	_, err := s.models.Get(ctx, s.defaultModel)
	switch {
	case s.defaultModel != "" && err == nil:
		names = []string{s.defaultModel}
	case s.defaultModel != "" && !errors.Is(err, finetune.ErrUnknownModel):
		return notReady("the default model cannot be used: %v", err)
	default:
		list, err := s.models.List(ctx)
		if err != nil {
			return notReady("the models cannot be listed: %v", err)
		}
		for _, m := range list {
			names = append(names, m.Name)
		}
	}
	failed := map[string]string{}
	for _, state := range s.generator.Models() {
		if state.State == child.Failed {
			failed[state.Model] = state.Error
		}
	}
	for _, name := range names {
		if _, bad := failed[name]; !bad {
			return encode(c, http.StatusOK, readyAnswer{"ready"})
		}
	}
	if len(names) == 0 {
		return notReady("there is no model yet: get one with hone pull or hone models add")
	}
	return notReady("the model %s does not start: %s", names[0], failed[names[0]])
}

// profile answers GET /debug/pprof/ and the profiles below it, as go tool pprof asks for them.
func (s *Server) profile(c *gin.Context) error {
	switch name := strings.TrimPrefix(c.Param("name"), "/"); name {
	case "cmdline":
		pprof.Cmdline(c.Writer, c.Request)
	case "profile":
		pprof.Profile(c.Writer, c.Request)
	case "symbol":
		pprof.Symbol(c.Writer, c.Request)
	case "trace":
		pprof.Trace(c.Writer, c.Request)
	default:
		if name != "" && profiles.Lookup(name) == nil {
			return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Code: new("not_found"),
				Message: fmt.Sprintf("there is no profile %.40q; GET /debug/pprof/ lists them", name)}
		}
		pprof.Index(c.Writer, c.Request)
	}
	return nil
}
