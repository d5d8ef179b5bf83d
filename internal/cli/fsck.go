package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/internal/fsck"
	"github.com/hone-llm/hone/internal/store"
)

// damageError says that hone fsck left something that is not as it should be.
type damageError struct{ error }

func newFsckCommand(s streams) *cobra.Command {
	var repair, asJSON bool
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "Examine the data directory: database, files, adapters, models and jobs, and repair it",
		Long: "Compares every byte of files, adapters and models with what was written down about them, examines the database, and\n" +
			"looks for what killed processes left. The server must not run. Without --repair nothing is changed. With it, nothing\n" +
			"that could be somebody's is destroyed: what is damaged goes to lost+found in the data directory.\n\n" +
			"The exit code is 0 if all is well, was repaired, or is cleared up by the server's next start; 3 if damage is left; and\n" +
			"1 if the directory could not be examined, because a server has it for example.",
		Example: "  hone fsck\n  hone fsck --repair\n  hone fsck --json | jq '.findings[] | select(.leftover | not)'",
		Args:    wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := serveConfig(cmd)
			if err != nil {
				return err
			}
			report, err := fsck.Check(cmd.Context(), cfg.DataDir, fsck.Options{Repair: repair})
			if err != nil && report.Dir == "" {
				return err
			}
			if printErr := printReport(s.out, report, asJSON); err != nil || printErr != nil {
				return errors.Join(err, printErr)
			}
			if left := report.Left(); left > 0 {
				advice := ""
				if !repair {
					advice = "; hone fsck --repair does what stands behind the arrows"
				}
				return damageError{fmt.Errorf("%s not as it should be%s", english.PluralWord(left, "1 thing is", fmt.Sprintf("%d things are", left)), advice)}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "repair what is found")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print {\"dir\", \"findings\": [{\"what\", \"problem\", \"leftover\", \"remedy\", \"repaired\"}]}")
	cmd.Flags().String("data-dir", "", "data directory, as of hone serve")
	return cmd
}

// printReport writes two lines for each finding, or JSON.
func printReport(w io.Writer, report fsck.Report, asJSON bool) error {
	if asJSON {
		out := json.NewEncoder(w)
		out.SetEscapeHTML(false)
		out.SetIndent("", "  ")
		return out.Encode(report)
	}
	for _, f := range report.Findings {
		if _, err := fmt.Fprintf(w, "%s: %s\n  %s\n", f.What, f.Problem, remedy(f)); err != nil {
			return err
		}
	}
	if len(report.Findings) > 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, "%s: all is well\n", report.Dir)
	return err
}

func remedy(f store.Finding) string {
	switch {
	case f.Repaired:
		return "repaired: " + f.Remedy
	case f.Repair == nil:
		return f.Remedy
	}
	return "-> --repair " + f.Remedy
}
