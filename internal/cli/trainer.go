package cli

import (
	"bufio"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/train"
)

// newTrainerCommand is one attempt at a fine-tuning job, a child of serve: see package child for what it reads and writes.
func newTrainerCommand(s streams) *cobra.Command {
	return &cobra.Command{
		Use:    "trainer",
		Short:  "Train one attempt of a job (started by hone serve)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := bufio.NewReader(s.in)
			line, err := in.ReadBytes('\n')
			if err != nil {
				return usageError{fmt.Errorf("trainer: expected its configuration on standard input: %w", err)}
			}
			var config child.TrainerConfig
			if err := json.Unmarshal(line, &config); err != nil {
				return usageError{fmt.Errorf("trainer: configuration: %w", err)}
			}
			return train.Run(cmd.Context(), config, in, s.out)
		},
	}
}
