// Package cli is the hone command: one file a subcommand, over the packages that do the work.
//
//	code := cli.Run(ctx, []string{"serve"}, os.Stdin, os.Stdout, os.Stderr)
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// Exit codes of Run.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitDamage      = 3   // of hone fsck
	exitInterrupted = 130 // as shells report SIGINT
)

// streams are the standard streams of a command; tests pass buffers.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// usageError is a wrong command line, as opposed to work that failed.
type usageError struct{ error }

// Run executes one command line and returns its exit code: 0 done, 1 failed, 2 wrong usage, 3 fsck left damage, 130 interrupted.
// It returns only after everything that the command started has ended.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	s := streams{in: stdin, out: stdout, err: stderr}
	root := newRootCommand(s)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	switch {
	case err == nil:
		return exitOK
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		fmt.Fprintln(stderr, "hone: interrupted")
		return exitInterrupted
	}
	fmt.Fprintln(stderr, "hone:", err)
	if errors.As(err, new(damageError)) {
		return exitDamage
	}
	// cobra has no types for two of its errors: a command that there is not, and required flags that are missing. With
	// either of them no command has run.
	_, _, unknown := root.Find(args)
	if errors.As(err, new(usageError)) || unknown != nil || cmd.ValidateRequiredFlags() != nil {
		return exitUsage
	}
	return exitError
}

func newRootCommand(s streams) *cobra.Command {
	root := &cobra.Command{
		Use:           "hone",
		Short:         "A local OpenAI-compatible model server that also fine-tunes",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentFlags().String("config", "", "configuration file (default: $HONE_HOME/hone.yaml if it exists)")
	// One line a command; each lives in the file of its name.
	root.AddCommand(
		newModelsCommand(s),
		newPullCommand(s),
		newServeCommand(s),
		newRunnerCommand(s),
		newTrainerCommand(s),
		newChatCommand(s),
		newDatasetCommand(s),
		newDemoCommand(s),
		newDoctorCommand(s),
		newFineTuneCommand(s),
		newFsckCommand(s),
		newKeyCommand(s),
		newPredictCommand(s),
	)
	return root
}
