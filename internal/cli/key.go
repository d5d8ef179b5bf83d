package cli

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/configs"
)

// newKey makes an API key of 130 random bits. Libraries for OpenAI's API, and tools that look for leaked secrets, know the
// beginning sk-.
func newKey() string { return "sk-hone-" + strings.ToLower(rand.Text()) }

func newKeyCommand(s streams) *cobra.Command {
	cmd := &cobra.Command{Use: "key", Short: "Make API keys", Args: wrongUsage(cobra.NoArgs)}
	var scopes []string
	create := &cobra.Command{
		Use:   "new NAME",
		Short: "Make an API key, and print it and its line for the configuration",
		Long: "Prints a new API key, once, and the line with its hash for the list keys in the configuration. Nothing is written: put the\n" +
			"line into " + configs.FileName + " and start the server again. Scopes: infer (completions, embeddings, models), train (files,\n" +
			"batches, fine-tuning jobs, deleting tuned models), admin (/metrics, /debug/pprof).",
		Example: "  hone key new laptop\n  hone key new prometheus --scopes admin",
		Args:    wrongUsage(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			secret := newKey()
			key := configs.Key{Name: args[0], SHA256: fmt.Sprintf("%x", sha256.Sum256([]byte(secret))), Scopes: scopes}
			cfg, err := configs.Default()
			if err != nil {
				return err
			}
			cfg.Keys = []configs.Key{key}
			if err := cfg.Validate(); err != nil {
				return usageError{err}
			}
			_, err = fmt.Fprintf(s.out, "%s\n\nis the key; it is shown only now. In %s:\n\nkeys:\n  - {name: %s, sha256: %q, scopes: [%s]}\n\n"+
				"Clients send it as Authorization: Bearer KEY; hone's own commands take it from HONE_API_KEY.\n",
				secret, configs.FileName, key.Name, key.SHA256, strings.Join(scopes, ", "))
			return err
		},
	}
	create.Flags().StringSliceVar(&scopes, "scopes", []string{"infer", "train"}, "what the key may be used for: "+strings.Join(configs.Scopes(), ", "))
	cmd.AddCommand(create)
	return cmd
}
