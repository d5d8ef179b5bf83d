package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/internal/app"
	"github.com/hone-llm/hone/internal/graph"
)

// trainerGrace is how long the running job may take, beyond the grace of the requests, to save its state.
const trainerGrace = 30 * time.Second

// serveFlags are the flags of hone serve and the keys of the configuration that they set.
var serveFlags = map[string]string{"host": "host", "port": "port", "data-dir": "data_dir"}

func newServeCommand(s streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the API, and run fine-tuning jobs",
		Long: "Serves OpenAI's API on http://127.0.0.1:8080/v1 and runs fine-tuning jobs. A line on standard output says when\n" +
			"and where it listens; the log goes to standard error. The default model is fetched if it is not there.\n\n" +
			"SIGINT and SIGTERM end it in order: answers in progress are finished and the running job saves its state, to go\n" +
			"on at the next start. A second signal ends it at once.",
		Example: "  hone serve\n  hone serve --port 0 --data-dir /tmp/hone",
		Args:    wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := serveConfig(cmd)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), s, cfg)
		},
	}
	cmd.Flags().String("host", "", "address to listen on (default 127.0.0.1)")
	cmd.Flags().Int("port", 0, "port to listen on, 0 for a free one (default 8080)")
	cmd.Flags().String("data-dir", "", "directory of models, jobs and uploads (default $HONE_HOME, or hone in the user's data directory)")
	return cmd
}

func serveConfig(cmd *cobra.Command) (configs.Config, error) {
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return configs.Config{}, err
	}
	sources := configs.Sources{File: file, Flags: map[string]any{}}
	for flag, key := range serveFlags {
		if f := cmd.Flags().Lookup(flag); f != nil && f.Changed {
			sources.Flags[key] = f.Value.String()
		}
	}
	return configs.Load(sources)
}

// serve runs the server until ctx ends, and then stops it.
func serve(ctx context.Context, s streams, cfg configs.Config) error {
	logger, err := newLogger(cfg.Log, s.err)
	if err != nil {
		return err
	}
	fetching := newTransfer(s.err, "fetching "+cfg.DefaultModel)
	a := app.New(cfg, app.Options{
		Logger: logger, Stderr: s.err, Trainable: graph.Trainable, Note: fetching.note,
		Progress: func(done, total int64) {
			fetching.progress(done, total)
			if done >= total { // the log follows below the bar
				fetching.end()
			}
		},
	})
	err = a.Start(ctx)
	fetching.end()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(s.out, "listening on %s\n", a.URL()); err != nil {
		logger.Warn("write to standard output", "error", err)
	}
	var failure error
	select {
	case <-ctx.Done():
		logger.Info("stopping; a second signal ends it at once")
	case failure = <-a.Failed():
	}
	stopping, cancel := context.WithTimeout(context.Background(), cfg.ShutdownGrace+trainerGrace)
	defer cancel()
	stopping, again := signal.NotifyContext(stopping, os.Interrupt, syscall.SIGTERM)
	defer again()
	if err := a.Stop(stopping); err != nil { //nolint:contextcheck // ctx has ended
		logger.Warn("stopped, but not in order", "error", err)
	}
	return failure
}

func newLogger(log configs.Log, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(log.Level)); err != nil {
		return nil, fmt.Errorf("log.level: %w", err)
	}
	options := &slog.HandlerOptions{Level: level}
	if log.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return slog.New(slog.NewTextHandler(w, options)), nil
}
