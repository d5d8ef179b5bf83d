package server

import (
	"context"
	"iter"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/memory"
)

// metrics are the numbers of GET /metrics. Labels have few values: routes are patterns, models are base models that are
// installed, and beyond maxModelLabels they are "other".
type metrics struct {
	registry *prometheus.Registry
	handler  http.Handler

	inFlight       prometheus.Gauge
	requests       *prometheus.CounterVec   // route, method, code
	durations      *prometheus.HistogramVec // route, method
	firstToken     *prometheus.HistogramVec // model
	perToken       *prometheus.HistogramVec // model
	promptTokens   *prometheus.CounterVec   // model
	cachedTokens   *prometheus.CounterVec   // model
	generateTokens *prometheus.CounterVec   // model

	mu     sync.Mutex
	models map[string]bool // that are labels
}

const maxModelLabels = 64

// Buckets, in seconds: of requests from a list to a long completion, of the time to the first token also of a model that has
// to be loaded, and of one token.
var (
	requestBuckets    = []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300}
	firstTokenBuckets = []float64{.005, .01, .02, .04, .08, .15, .25, .5, 1, 2, 4, 8, 15, 30, 60}
	perTokenBuckets   = []float64{.001, .0025, .005, .01, .02, .03, .05, .075, .1, .15, .25, .5, 1}
)

func newMetrics(opts Options) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	}
	m := &metrics{
		registry:       prometheus.NewRegistry(),
		inFlight:       prometheus.NewGauge(prometheus.GaugeOpts{Name: "hone_http_requests_in_flight", Help: "Requests that are being answered."}),
		requests:       counter("hone_http_requests_total", "Requests that were answered. Code 499: the client went away before.", "route", "method", "code"),
		durations:      histogram("hone_http_request_duration_seconds", "Time until a request was answered whole, streams to their end.", requestBuckets, "route", "method"),
		firstToken:     histogram("hone_time_to_first_token_seconds", "Time until a completion's first token, with waiting and loading; without batches.", firstTokenBuckets, "model"),
		perToken:       histogram("hone_time_per_output_token_seconds", "Mean time between a completion's tokens; without batches.", perTokenBuckets, "model"),
		promptTokens:   counter("hone_prompt_tokens_total", "Tokens of prompts, those in the prefix cache too.", "model"),
		cachedTokens:   counter("hone_cached_prompt_tokens_total", "Tokens of prompts that were found in the prefix cache.", "model"),
		generateTokens: counter("hone_generation_tokens_total", "Tokens of completions.", "model"),
		models:         map[string]bool{},
	}
	m.registry.MustRegister(m.inFlight, m.requests, m.durations, m.firstToken, m.perToken, m.promptTokens, m.cachedTokens, m.generateTokens,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&stateCollector{generator: opts.Generator, runners: opts.RunnerStatus, jobs: opts.JobStats, label: m.model})
	m.handler = promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
	return m
}

// showMetrics answers GET /metrics in Prometheus' text format.
func (s *Server) showMetrics(c *gin.Context) error {
	s.metrics.handler.ServeHTTP(c.Writer, c.Request)
	return nil
}

// request counts one that was answered. route is its pattern, "" of one that no route takes.
func (m *metrics) request(route, method string, status int, took time.Duration) {
	if route == "" {
		route = "none"
	}
	switch method {
	case http.MethodGet, http.MethodPost, http.MethodDelete, http.MethodPut, http.MethodPatch, http.MethodHead, http.MethodOptions:
	default:
		method = "other"
	}
	m.requests.WithLabelValues(route, method, strconv.Itoa(status)).Inc()
	m.durations.WithLabelValues(route, method).Observe(took.Seconds())
}

// model is the label of a base model.
func (m *metrics) model(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.models[name] {
		if len(m.models) >= maxModelLabels {
			return "other"
		}
		m.models[name] = true
	}
	return name
}

// measured counts what a Generator computes.
type measured struct {
	Generator

	metrics *metrics
}

func (g measured) Generate(ctx context.Context, base child.Base, req child.GenerateRequest) iter.Seq2[child.GenerateEvent, error] {
	events := g.Generator.Generate(ctx, base, req)
	return func(yield func(child.GenerateEvent, error) bool) {
		began, model := time.Now(), g.metrics.model(base.Name)
		var first time.Time
		timed := !req.Background && !req.PromptOnly && !req.Echo
		for event, err := range events {
			if err == nil {
				if timed && first.IsZero() {
					first = time.Now()
					g.metrics.firstToken.WithLabelValues(model).Observe(first.Sub(began).Seconds())
				}
				if u := event.Usage; u != nil {
					g.metrics.usage(model, u)
					if rest := u.CompletionTokens/max(1, req.N) - 1; timed && rest > 0 {
						g.metrics.perToken.WithLabelValues(model).Observe(time.Since(first).Seconds() / float64(rest))
					}
				}
			}
			if !yield(event, err) {
				return
			}
		}
	}
}

func (g measured) Embed(ctx context.Context, base child.Base, req child.EmbedRequest) (child.EmbedResponse, error) {
	resp, err := g.Generator.Embed(ctx, base, req)
	if err == nil {
		g.metrics.usage(g.metrics.model(base.Name), &child.Usage{PromptTokens: resp.PromptTokens})
	}
	return resp, err
}

func (m *metrics) usage(model string, u *child.Usage) {
	m.promptTokens.WithLabelValues(model).Add(float64(u.PromptTokens))
	m.cachedTokens.WithLabelValues(model).Add(float64(u.CachedTokens))
	m.generateTokens.WithLabelValues(model).Add(float64(u.CompletionTokens))
}

// stateCollector asks runners and jobs how they are whenever /metrics is read.
type stateCollector struct {
	generator Generator
	runners   func(ctx context.Context) []child.RunnerStatus
	jobs      func(ctx context.Context) (finetune.Stats, error)
	label     func(model string) string
}

// collectTimeout is for a runner between two long batches.
const collectTimeout = time.Second

func stateDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	runnerUp       = stateDesc("hone_runner_ready", "1 of a base model that is in memory, 0 of one that is loading, waiting or does not start.", "model")
	runnerRequests = stateDesc("hone_runner_requests", "Requests that a base model's process serves, or that wait for it.", "model")
	runnerMemory   = stateDesc("hone_runner_memory_bytes", "Memory granted to a base model's process.", "model")
	runnerResident = stateDesc("hone_runner_resident_memory_bytes", "Memory that a base model's process holds, without pages of files.", "model")
	jobResident    = stateDesc("hone_job_resident_memory_bytes", "Memory that the running job's process holds, without pages of files.", "job_id")
	queueRunning   = stateDesc("hone_running", "Completions that are being computed.", "model")
	queueDepth     = stateDesc("hone_queue_depth", "Completions that wait for their turn.", "model")
	cachePool      = stateDesc("hone_cache_tokens", "Tokens that the key-value cache has room for.", "model")
	cacheFree      = stateDesc("hone_cache_free_tokens", "Tokens of the key-value cache that nothing holds.", "model")
	jobCount       = stateDesc("hone_jobs", "Fine-tuning jobs.", "status")
	jobSteps       = stateDesc("hone_job_steps_total", "Optimizer steps of all fine-tuning jobs.")
	jobTokens      = stateDesc("hone_job_trained_tokens_total", "Tokens that all fine-tuning jobs were trained on.")
	jobStep        = stateDesc("hone_job_step", "Optimizer steps done by the running job.", "job_id")
	jobTotal       = stateDesc("hone_job_total_steps", "Optimizer steps that the running job will do.", "job_id")
	jobStepRate    = stateDesc("hone_job_steps_per_second", "Optimizer steps of the running job, by its own estimate of the time left.", "job_id")
	jobTokenRate   = stateDesc("hone_job_tokens_per_second", "Tokens of the running job.", "job_id")
	jobTrainLoss   = stateDesc("hone_job_train_loss", "Loss of the running job's last step, in nats for a token.", "job_id")
	jobValidLoss   = stateDesc("hone_job_validation_loss", "Loss of the running job's last evaluation, in nats for a token.", "job_id")
)

// Describe implements prometheus.Collector. It sends nothing: what there is follows from what runs.
func (*stateCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s *stateCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	if s.jobs != nil { // first: runners may use the time up
		s.collectJobs(ctx, out)
	}
	gauge := gaugeTo(out)
	seen := map[string]bool{} // two files under one name are two bases, and one label
	for _, m := range s.generator.Models() {
		model := s.label(m.Model)
		if seen[model] {
			continue
		}
		seen[model] = true
		ready := 0.0
		if m.State == child.Ready {
			ready = 1
		}
		gauge(runnerUp, ready, model)
		gauge(runnerRequests, float64(m.Requests), model)
		gauge(runnerMemory, float64(m.MemoryBytes), model)
		if own, _, err := memory.Of(m.PID); m.PID != 0 && err == nil { // one that has just ended has none
			gauge(runnerResident, float64(own), model)
		}
	}
	if s.runners != nil {
		clear(seen)
		for _, r := range s.runners(ctx) {
			model := s.label(r.Model)
			if seen[model] {
				continue
			}
			seen[model] = true
			gauge(queueRunning, float64(r.Running), model)
			gauge(queueDepth, float64(r.Waiting), model)
			gauge(cachePool, float64(r.PoolTokens), model)
			gauge(cacheFree, float64(r.FreeTokens), model)
		}
	}
}

func gaugeTo(out chan<- prometheus.Metric) func(desc *prometheus.Desc, value float64, labels ...string) {
	return func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
}

func (s *stateCollector) collectJobs(ctx context.Context, out chan<- prometheus.Metric) {
	gauge := gaugeTo(out)
	stats, err := s.jobs(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(jobCount, err)
		return
	}
	for status, n := range stats.Jobs {
		gauge(jobCount, float64(n), string(status))
	}
	out <- prometheus.MustNewConstMetric(jobSteps, prometheus.CounterValue, float64(stats.Steps))
	out <- prometheus.MustNewConstMetric(jobTokens, prometheus.CounterValue, float64(stats.TrainedTokens))
	for id, pid := range stats.Processes {
		if own, _, err := memory.Of(pid); err == nil {
			gauge(jobResident, float64(own), id)
		}
	}
	for _, job := range stats.Running {
		p := job.Progress
		gauge(jobStep, float64(p.Step)+p.Fraction, job.ID)
		gauge(jobTotal, float64(p.TotalSteps), job.ID)
		gauge(jobTokenRate, p.TokensPerSecond, job.ID)
		if left := float64(p.TotalSteps-p.Step) - p.Fraction; p.SecondsLeft > 0 && left > 0 {
			gauge(jobStepRate, left/p.SecondsLeft, job.ID)
		}
		if p.TrainLoss != nil {
			gauge(jobTrainLoss, *p.TrainLoss, job.ID)
		}
		if p.ValidLoss != nil {
			gauge(jobValidLoss, *p.ValidLoss, job.ID)
		}
	}
}
