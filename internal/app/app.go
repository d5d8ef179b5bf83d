// Package app wires the server: configuration, state, children and API, started and stopped in order.
//
//	a := app.New(cfg, app.Options{Logger: logger})
//	err := a.Start(ctx) // listens when it returns nil
//	fmt.Println("http://" + a.Addr())
//	err = a.Stop(ctx)   // drains, saves the running job's state, leaves no process
package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/batch"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/server"
)

// Options are what the configuration does not say. The zero value runs this binary's own roles and logs nothing.
type Options struct {
	Logger *slog.Logger // nil drops the log
	Stderr io.Writer    // gets the runners' standard error; nil drops it
	// Exe and Env are for tests: the program that has the runner and trainer roles, and what is added to its environment.
	Exe string
	Env []string

	// Trainable says why the model in a GGUF file cannot be trained. If it is nil, trainers say so.
	Trainable func(path string) error

	// IdleJobs lets fine-tuning jobs and batches wait for the next server; dry runs work all the same.
	IdleJobs bool

	Note     func(line string)       // is told what happens while the default model is fetched, for people
	Progress func(done, total int64) // of fetching the default model, bytes
}

// Limits of the HTTP server. Answers may take as long as they do.
const (
	idleTimeout    = 2 * time.Minute
	maxHeaderBytes = 64 << 10
)

// App is the server. It is used once: New, Start, Stop.
type App struct {
	cfg  configs.Config
	opts Options

	state       *store.Store
	registry    *adapters.Registry
	memory      *child.Memory
	runners     *child.Runners
	jobs        *finetune.Jobs
	batches     *batch.Batches
	expiry      *expiry
	listener    net.Listener
	api         *server.Server
	http        *http.Server
	certificate *certificate            // nil: plain HTTP
	requests    context.CancelCauseFunc // ends the contexts of all requests
	failed      chan error

	stopOnce sync.Once
	stopErr  error
}

// New returns a server that has started nothing yet.
func New(cfg configs.Config, opts Options) *App {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	return &App{cfg: cfg, opts: opts, failed: make(chan error, 1)}
}

// Start takes the data directory, fetches the default model if it is not there, lets interrupted jobs go on, and
// listens. If it returns an error, nothing of it is left; ctx is for the start only.
func (a *App) Start(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.ShutdownGrace)
			defer cancel()
			err = errors.Join(err, a.Stop(stop))
		}
	}()
	if a.state, err = store.Open(ctx, a.cfg.DataDir, store.Options{Logger: a.opts.Logger}); err != nil {
		return err
	}
	if a.cfg.TLS.CertFile != "" {
		if a.certificate, err = loadCertificate(a.cfg.TLS.CertFile, a.cfg.TLS.KeyFile, a.opts.Logger); err != nil {
			return err
		}
	}
	// Before the model is fetched, which may take minutes: requests wait in the queue of the socket until all is ready.
	if a.listener, err = a.listen(ctx); err != nil {
		return err
	}
	modelStore, err := models.Open(filepath.Join(a.cfg.DataDir, "models"), models.Options{Logger: a.opts.Logger})
	if err != nil {
		return err
	}
	if err := a.fetchDefault(ctx, modelStore); err != nil {
		return err
	}
	bases := baseModels{modelStore}
	if a.registry, err = adapters.Open(ctx, filepath.Join(a.cfg.DataDir, "adapters"), a.state, adapters.Options{
		Logger: a.opts.Logger,
		Removed: func(id string) {
			if a.runners != nil { // else the registry is opened, and no runner has any
				a.runners.UnloadAdapter(id)
			}
		},
	}); err != nil {
		return err
	}
	sockets, err := a.socketDir()
	if err != nil {
		return err
	}
	a.memory = child.NewMemory(a.cfg.MemoryBytes())
	a.runners = child.NewRunners(child.RunnersOptions{
		Exe: a.opts.Exe, Env: append([]string{"HONE_LOG_LEVEL=" + a.cfg.Log.Level}, a.opts.Env...), Stderr: a.opts.Stderr, SocketDir: sockets, Logger: a.opts.Logger,
		Config: child.RunnerConfig{
			ContextTokens: a.cfg.ContextTokens, Sequences: a.cfg.Sequences, Threads: a.cfg.Threads, Device: a.cfg.Device,
			Engine: a.cfg.Runner.Engine, CacheTokens: a.cfg.Runner.CacheTokens, CacheType: a.cfg.Runner.CacheType, GPUWeights: a.cfg.Runner.GPUWeights,
			Queue: a.cfg.Runner.Queue, AdapterBytes: a.cfg.Runner.AdapterBytes(),
		},
		ContextTokens: a.cfg.ContextTokensOf(), ReadyTimeout: a.cfg.LoadTimeout, Wait: a.cfg.Runner.Wait,
		IdleTimeout: a.cfg.Runner.IdleTimeout, HangTimeout: a.cfg.Runner.HangTimeout, Memory: a.memory, Estimate: runnerBytes,
	})
	a.jobs = finetune.New(finetune.Options{
		Store: a.state, Models: bases, Adapters: a.registry, Start: a.startTrainer, Trainable: a.trainable, Dir: filepath.Join(a.cfg.DataDir, "jobs"),
		Logger: a.opts.Logger, Threads: a.cfg.Threads, Device: a.cfg.Trainer.Device, MemoryBytes: a.cfg.Trainer.MemoryBytes(),
		CacheDir: filepath.Join(a.cfg.DataDir, "cache", "tokenized"),
		Retention: finetune.Retention{
			ResumeStates: a.cfg.Retention.ResumeStates, Checkpoints: a.cfg.Retention.Checkpoints, Events: a.cfg.Retention.Events,
			Files: a.cfg.Retention.Files, CacheBytes: a.cfg.Trainer.CacheBytes(),
		},
	})
	if !a.opts.IdleJobs {
		if err := a.jobs.Start(ctx); err != nil {
			return err
		}
	}
	a.batches = batch.New(batch.Options{Store: a.state, Logger: a.opts.Logger})
	a.api = server.New(server.Options{
		Generator: a.runners, Models: bases, Adapters: a.registry, Jobs: a.jobs, Files: a.state, Batches: a.batches, Logger: a.opts.Logger,
		AllowedHosts: append([]string{a.cfg.Host}, a.cfg.AllowedHosts...),
		// Every request from elsewhere has a key, which a page that points its own name here does not know.
		AnyHost:     !a.cfg.Loopback() && len(a.cfg.AllowedHosts) == 0,
		CORSOrigins: a.cfg.CORSOrigins, Keys: keys(&a.cfg), MaxBodyBytes: a.cfg.Limits.BodyBytes(), BodyTimeout: a.cfg.Limits.BodyTimeout,
		DefaultModel: a.cfg.DefaultModel, RunnerStatus: a.runners.Status, JobStats: a.jobs.Stats,
	})
	a.expiry = newExpiry(a.state, a.opts.Logger) //nolint:contextcheck // it outlives the start, as requests do
	if !a.opts.IdleJobs {
		a.batches.Start(a.api)
	}
	a.serve(a.api) //nolint:contextcheck // requests outlive the start
	a.opts.Logger.Info("listening", "url", a.URL(), "data_dir", a.cfg.DataDir)
	if !a.cfg.Loopback() && a.certificate == nil {
		a.opts.Logger.Warn("other machines reach this one without TLS: keys and texts can be read on the way; set tls.cert_file and tls.key_file, or put a proxy with TLS before it")
	}
	return nil
}

// socketDir is an empty directory: what a killed server left in it is removed, which the lock of the data directory allows.
func (a *App) socketDir() (string, error) {
	dir := filepath.Join(a.cfg.DataDir, "run")
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return "", fmt.Errorf("directory of sockets: %w", err)
	}
	return dir, nil
}

func (a *App) listen(ctx context.Context) (net.Listener, error) {
	addr := net.JoinHostPort(a.cfg.Host, strconv.Itoa(a.cfg.Port))
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("port %d is in use; choose another with --port or port: in %s (0 takes a free one)", a.cfg.Port, configs.FileName)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("port %d needs privileges; choose one above 1023 with --port or port: in %s", a.cfg.Port, configs.FileName)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("host %s is no address of this machine; choose another with --host or host: in %s", a.cfg.Host, configs.FileName)
	case err != nil:
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return listener, nil
}

// fetchDefault makes sure that the default model is there. Without it, other models are served all the same.
func (a *App) fetchDefault(ctx context.Context, modelStore *models.Store) error {
	name := a.cfg.DefaultModel
	if name == "" {
		return nil
	}
	if _, err := modelStore.Get(name); !errors.Is(err, models.ErrNotFound) {
		return nil // there, or damaged: then a request for it says how
	}
	err := a.pull(ctx, modelStore, name)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if list, listErr := modelStore.List(); listErr == nil && len(list) > 0 {
		a.opts.Logger.Warn("the default model could not be fetched; the others are served", "model", name, "error", err)
		return nil
	}
	return fmt.Errorf("fetch the default model %s: %w", name, err)
}

func (a *App) pull(ctx context.Context, modelStore *models.Store, name string) error {
	source, err := models.ParseSource(name)
	if err != nil {
		return fmt.Errorf("default_model: %w", err)
	}
	environment := models.Environment(os.Getenv)
	environment.Note = a.opts.Note
	cache, err := models.NewCache(environment)
	if err != nil {
		return err
	}
	_, err = modelStore.Pull(ctx, cache, source, "", a.opts.Progress)
	return err
}

func (a *App) serve(s *server.Server) {
	requests, cancel := context.WithCancelCause(context.Background())
	a.requests = cancel
	a.http = &http.Server{
		Handler:           s.Handler(),
		BaseContext:       func(net.Listener) context.Context { return requests },
		ReadHeaderTimeout: a.cfg.Limits.HeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(a.opts.Logger.Handler(), slog.LevelDebug),
	}
	serve := a.http.Serve
	if a.certificate != nil {
		a.http.TLSConfig = &tls.Config{GetCertificate: a.certificate.get, MinVersion: tls.VersionTLS12}
		serve = func(l net.Listener) error { return a.http.ServeTLS(l, "", "") }
	}
	go func() {
		if err := serve(patientListener{a.listener, a.cfg.Limits.WriteTimeout}); !errors.Is(err, http.ErrServerClosed) {
			a.failed <- fmt.Errorf("serve %s: %w", a.Addr(), err)
		}
	}()
}

// Addr is the address that Start listens on, host:port.
func (a *App) Addr() string { return a.listener.Addr().String() }

// URL is where this machine reaches the server: one that listens on all addresses listens on the loopback one too.
func (a *App) URL() string {
	host, port, err := net.SplitHostPort(a.Addr())
	if err != nil {
		panic("a listener without a port: " + err.Error())
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	scheme := "http"
	if a.certificate != nil {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

// Failed carries the error with which the server ended by itself, if it ever does.
func (a *App) Failed() <-chan error { return a.failed }

// Stop lets answers in progress finish for the configured grace and saves the running job's state meanwhile, then ends
// all children and closes the data directory. When ctx ends, everything is ended at once. It returns when no process is
// left, and may be called twice, and before Start.
func (a *App) Stop(ctx context.Context) error {
	a.stopOnce.Do(func() { a.stopErr = a.stop(ctx) })
	return a.stopErr
}

func (a *App) stop(ctx context.Context) error {
	var errs []error
	answered := (<-chan struct{})(nil)
	if a.api != nil {
		answered = a.api.Drain()
	}
	jobs := make(chan error, 1)
	go func() {
		if a.jobs == nil {
			jobs <- nil
			return
		}
		jobs <- a.jobs.Stop(ctx)
	}()
	if a.batches != nil {
		a.batches.Stop() // their answers are the next server's
	}
	if a.http != nil {
		a.drain(ctx, answered)
	}
	errs = append(errs, <-jobs)
	if a.http != nil {
		a.closeHTTP()
	} else if a.listener != nil {
		errs = append(errs, a.listener.Close())
	}
	if a.runners != nil {
		soft, cancel := context.WithTimeout(ctx, 2*time.Second) // there is nothing left for them to do
		a.runners.Stop(soft)
		cancel()
	}
	if a.registry != nil {
		errs = append(errs, a.registry.Close())
	}
	if a.expiry != nil {
		a.expiry.stop()
	}
	if a.state != nil {
		errs = append(errs, a.state.Close())
	}
	return errors.Join(errs...)
}

// lastWords is how long requests that are ended may take to write their error.
const lastWords = time.Second

// drain waits until the requests in progress are answered, and ends those that take too long: their streams get an error.
// New ones are refused meanwhile, with a 503 that says so, which a closed port would not.
func (a *App) drain(ctx context.Context, answered <-chan struct{}) {
	grace, cancel := context.WithTimeout(ctx, a.cfg.ShutdownGrace)
	defer cancel()
	select {
	case <-answered:
		return
	case <-grace.Done():
	}
	a.opts.Logger.Warn("requests in progress are ended", "grace", a.cfg.ShutdownGrace)
	a.requests(child.ErrStopping)
	select {
	case <-answered:
	case <-time.After(lastWords):
	}
}

// closeHTTP closes the port and all connections, of which those that are still in use are of clients that do not read.
func (a *App) closeHTTP() {
	last, cancel := context.WithTimeout(context.Background(), lastWords)
	defer cancel()
	if err := a.http.Shutdown(last); err != nil {
		_ = a.http.Close()
	}
	a.requests(child.ErrStopping)
}
