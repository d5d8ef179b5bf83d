package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/gguf"
	"github.com/hone-llm/hone/internal/lora"
	"github.com/hone-llm/hone/internal/models"
	"github.com/hone-llm/hone/internal/store"
)

func newModelsCommand(s streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "models",
		Short: "List, add and remove base models",
		Args:  wrongUsage(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newModelsListCommand(s), newModelsAddCommand(s), newModelsAddAdapterCommand(s), newModelsRemoveCommand(s))
	return cmd
}

func newModelsListCommand(s streams) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the base models",
		Args:    wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, store, err := openModels(cmd, s)
			if err != nil {
				return err
			}
			list, err := store.List()
			if err != nil {
				return err
			}
			if len(list) == 0 {
				_, err := fmt.Fprintln(s.out, "there are no models yet: get one with `hone pull` or `hone models add FILE.gguf`")
				return err
			}
			_, err = fmt.Fprintln(s.out, modelTable(list))
			return err
		},
	}
}

func modelTable(list []models.Model) string {
	t := plainTable()
	right := table.ColumnConfig{Align: text.AlignRight, AlignHeader: text.AlignRight}
	var columns []table.ColumnConfig
	for _, n := range []int{3, 5, 6} {
		right.Number = n
		columns = append(columns, right)
	}
	t.SetColumnConfigs(columns)
	t.AppendHeader(table.Row{"name", "architecture", "parameters", "type", "context", "size", "added", "sha256"})
	for _, m := range list {
		t.AppendRow(table.Row{m.Name, m.Architecture, humanize.SIWithDigits(float64(m.Parameters), 1, ""), m.Quantisation,
			m.ContextTokens, humanize.Bytes(uint64(m.Bytes)), time.Unix(m.CreatedAt, 0).Format(time.DateOnly), m.Digest[:min(12, len(m.Digest))]})
	}
	return t.Render()
}

func newModelsAddCommand(s streams) *cobra.Command {
	var opts models.AddOptions
	cmd := &cobra.Command{
		Use:   "add FILE.gguf",
		Short: "Make a GGUF file a base model",
		Long: "Validates a GGUF file and copies it into the model store (without using disk space where the file system can\n" +
			"clone). A running server serves it at once.\n\n" +
			"The vocabulary and the chat template in the file are used, unless others are named here.",
		Example: "  hone models add qwen2.5-0.5b-instruct-q8_0.gguf --name qwen2.5-0.5b",
		Args:    wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, store, err := openModels(cmd, s)
			if err != nil {
				return err
			}
			t := newTransfer(s.err, "adding")
			opts.Progress = t.progress
			m, err := store.Add(cmd.Context(), args[0], opts)
			t.end()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(s.out, "added %s: %s, %s parameters, %s\n", m.Name, m.Architecture,
				humanize.SIWithDigits(float64(m.Parameters), 1, ""), m.Quantisation)
			return err
		},
	}
	cmd.Flags().StringVar(&opts.Name, "name", "", "what to call the model (default: the file's name without .gguf)")
	cmd.Flags().StringVar(&opts.Tokenizer, "tokenizer", "", "tokenizer.json of the model's Hugging Face repository")
	cmd.Flags().StringVar(&opts.ChatTemplate, "chat-template", "", "Jinja file to use for chat in place of the template in the GGUF file")
	return cmd
}

func newModelsAddAdapterCommand(s streams) *cobra.Command {
	var base, suffix string
	cmd := &cobra.Command{
		Use:   "add-adapter DIR --base MODEL",
		Short: "Make a LoRA adapter of PEFT, or of another hone, a tuned model",
		Long: "DIR holds adapter_config.json and adapter_model.safetensors as PEFT saves them, or an adapter.gguf. It is compared with\n" +
			"the base model and copied. A running server serves it at once, and jobs can go on from it.",
		Example: "  hone models add-adapter ./my-lora --base llama-8b --suffix mine",
		Args:    wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, store, err := openModels(cmd, s)
			if err != nil {
				return err
			}
			model, err := store.Get(base)
			if err != nil {
				return err
			}
			name, err := addAdapter(args[0], model, suffix, filepath.Join(cfg.DataDir, "adapters"))
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(s.out, name)
			return err
		},
	}
	cmd.Flags().StringVar(&base, "base", "", "the base model that it was trained on")
	cmd.Flags().StringVar(&suffix, "suffix", "", "part of the tuned model's name (default: the directory's name)")
	_ = cmd.MarkFlagRequired("base") // an error means that there is no such flag
	return cmd
}

// addAdapter writes the adapter in dir into the directory of all adapters, as a tuned model of base, and returns its name.
func addAdapter(dir string, base models.Model, suffix, all string) (name string, err error) {
	file, err := gguf.Open(filepath.Join(base.Dir, models.WeightsFile))
	if err != nil {
		return "", err
	}
	defer file.Close()
	w, err := lora.Read(dir, file)
	if err != nil {
		return "", err
	}
	m := &w.Manifest
	if m.BaseDigest != "" && m.BaseDigest != base.Digest {
		return "", fmt.Errorf("%s was trained on %s with sha256 %.12s, and %s has %.12s", dir, m.BaseModel, m.BaseDigest, base.Name, base.Digest)
	}
	if suffix == "" {
		if dir, err = filepath.Abs(dir); err != nil {
			return "", err
		}
		suffix = filepath.Base(dir)
	}
	m.ID = store.NewID("", 8)
	m.Name = adapters.Name(base.Name, suffix, m.ID)
	m.BaseModel, m.BaseDigest, m.JobID, m.CreatedAt = base.Name, base.Digest, "", time.Now().Unix()
	return m.Name, lora.Export(filepath.Join(all, m.ID), w)
}

func newModelsRemoveCommand(s streams) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm MODEL",
		Aliases: []string{"remove"},
		Short:   "Remove a base model",
		Long: "Removes a base model from the model store, unless models that were tuned from it or unfinished jobs are there. With --force these stay,\n" +
			"but cannot answer until the same base model is added again under its name.",
		Args: wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, bases, err := openModels(cmd, s)
			if err != nil {
				return err
			}
			if _, err := bases.Get(args[0]); !force && !errors.Is(err, models.ErrNotFound) {
				tuned, err := tunedFrom(filepath.Join(cfg.DataDir, "adapters"), args[0])
				if err != nil {
					return err
				}
				jobs, err := store.UnfinishedJobs(cmd.Context(), cfg.DataDir, args[0])
				if err != nil {
					return err
				}
				if len(jobs) > 0 {
					return fmt.Errorf("%s is the base of %s: %s; cancel these first (hone finetune cancel JOB), or say --force",
						args[0], english.Plural(len(jobs), "unfinished job", ""), strings.Join(jobs, ", "))
				}
				if len(tuned) > 0 {
					return fmt.Errorf("%s is the base of %s, useless without it: %s; delete these first (DELETE /v1/models/NAME of a running server), or say --force",
						args[0], english.Plural(len(tuned), "tuned model", ""), strings.Join(tuned, ", "))
				}
			}
			if err := bases.Remove(args[0]); err != nil {
				return err
			}
			_, err = fmt.Fprintln(s.out, "removed", args[0])
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "remove it although tuned models of it or unfinished jobs are there")
	return cmd
}

// tunedFrom returns the names of the tuned models of a base model that are in the directory of the adapters. Their
// manifests are read rather than the database, which a running server has locked.
func tunedFrom(dir, base string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for tuned models: %w", err)
	}
	var names []string
	for _, e := range entries {
		m, err := lora.ReadManifest(filepath.Join(dir, e.Name()))
		if err == nil && m.BaseModel == base { // without a manifest, or with a damaged one, it cannot be served anyway
			names = append(names, m.Name)
		}
	}
	return names, nil
}

// plainLogger is the log of commands that people call: warnings, without times.
func plainLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		Level: slog.LevelWarn,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}
