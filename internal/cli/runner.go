package cli

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/hone-llm/hone/internal/runner"
	"github.com/spf13/cobra"
)

// newRunnerCommand is the role that serve starts as a child, once for each loaded base model: see package child.
func newRunnerCommand(s streams) *cobra.Command {
	return &cobra.Command{
		Use:    "runner",
		Short:  "Serve one base model to the server that started it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if text := os.Getenv("HONE_LOG_LEVEL"); text != "" { // serve sets it to its own
				if err := level.UnmarshalText([]byte(text)); err != nil {
					return fmt.Errorf("log.level: %w", err)
				}
			}
			logger := slog.New(slog.NewTextHandler(s.err, &slog.HandlerOptions{Level: level}))
			return runner.Run(cmd.Context(), s.in, s.out, logger)
		},
	}
}
