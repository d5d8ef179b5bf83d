package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/dustin/go-humanize/english"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/internal/doctor"
	"github.com/hone-llm/hone/internal/ggml"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/memory"
	"github.com/hone-llm/hone/internal/models"
)

// engineTimeout is for loading a GPU's library and driver, which take seconds where nothing has used them since the start.
const engineTimeout = 30 * time.Second

func newDoctorCommand(s streams) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Examine this machine: what hone uses of it, why not the rest, and how to mend it",
		Long: "Looks at the processor and what the engine was built for, GPU and driver, memory and disk, the data directory and the\n" +
			"server, the default model and where models come from. The exit code is 1 if something will fail (a problem), and 0 if\n" +
			"it works, even if slower than it could (a warning).",
		Example: "  hone doctor\n  hone doctor --json | jq '.checks[] | select(.status != \"ok\")'",
		Args:    wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			checks := examine(cmd)
			if err := cmd.Context().Err(); err != nil {
				return err
			}
			if err := printChecks(s.out, checks, asJSON); err != nil {
				return err
			}
			if doctor.Worst(checks) == doctor.Problem {
				return errors.New(summary(checks))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print {\"status\", \"checks\": [{\"name\", \"status\", \"found\", \"fix\"}]}")
	cmd.Flags().String("host", "", "address that the server is to listen on, as of hone serve")
	cmd.Flags().Int("port", 0, "port of the server, as of hone serve")
	cmd.Flags().String("data-dir", "", "data directory, as of hone serve")
	cmd.AddCommand(newDoctorEngineCommand(s))
	return cmd
}

// newDoctorEngineCommand is the engine's part of the examination, in a process of its own: a wrong instruction or a driver
// may end it. It writes what is known without a driver first, and then everything.
func newDoctorEngineCommand(s streams) *cobra.Command {
	return &cobra.Command{
		Use:    "engine",
		Short:  "What the engine says about itself (started by hone doctor)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			e := doctor.Engine{OpenMP: ggml.HasOpenMP(), Repack: ggml.HasRepack(), Layout: graph.ExactLayout().String()}
			for _, f := range ggml.Features() {
				e.Features = append(e.Features, doctor.Feature{Name: f.Name, Built: f.Built})
			}
			if dir, err := ggml.LibraryDirectory(); err == nil {
				e.Library = filepath.Join(dir, "libggml-cuda.so")
			}
			out := json.NewEncoder(s.out)
			if err := out.Encode(e); err != nil {
				return err
			}
			devices, err := ggml.Devices("")
			if err != nil {
				e.NoGPU = err.Error()
			}
			for _, d := range devices {
				e.GPUs = append(e.GPUs, doctor.GPU{Name: d.Description, FreeBytes: int64(d.FreeBytes), MemoryBytes: int64(d.MemoryBytes)})
			}
			e.Looked = true
			return out.Encode(e)
		},
	}
}

// examine makes all checks. A configuration that cannot be used is one of them, and the others take the defaults.
func examine(cmd *cobra.Command) []doctor.Check {
	cfg, err := serveConfig(cmd)
	first := doctor.Check{Name: "configuration", Status: doctor.OK, Found: "the defaults, and the environment"}
	if err != nil {
		first = doctor.Check{Name: "configuration", Status: doctor.Problem, Found: strings.ReplaceAll(err.Error(), "\n", "; "), Fix: "correct it; configs/default.yaml shows every key. What follows is of the defaults"}
		if cfg, err = configs.Default(); err != nil {
			return []doctor.Check{first}
		}
	} else if file, _ := cmd.Flags().GetString("config"); file != "" {
		first.Found = file
	} else if file = filepath.Join(cfg.DataDir, configs.FileName); exists(file) {
		first.Found = file
	}
	o := doctor.Options{
		DataDir: cfg.DataDir, Host: cfg.Host, Port: cfg.Port, Key: cfg.APIKey, CertFile: cfg.TLS.CertFile, DefaultModel: cfg.DefaultModel, Device: cfg.Device,
		TrainerDevice: cfg.Trainer.Device, Memory: cfg.MemoryBytes(), TrainerMemory: cfg.Trainer.MemoryBytes(), Threads: cfg.Threads,
		Cores: runtime.NumCPU(), Quota: runtime.GOMAXPROCS(0), Engine: askEngine,
	}
	o.FreeMemory, o.GroupFree, o.MemoryErr = memory.Free()
	o.Cache, o.CacheErr = models.NewCache(models.Environment(os.Getenv))
	return append([]doctor.Check{first}, doctor.Run(cmd.Context(), o)...)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// askEngine runs the engine's part. What it said before an error is returned with the error.
func askEngine(ctx context.Context) (e doctor.Engine, err error) {
	exe, err := os.Executable()
	if err != nil {
		return e, err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "doctor", "engine")
	cmd.WaitDelay = time.Second
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	last := strings.TrimSpace(said.String())
	last = last[strings.LastIndexByte(last, '\n')+1:]
	if err != nil && last != "" {
		err = fmt.Errorf("%w: %s", err, last)
	}
	for lines := json.NewDecoder(&out); ; {
		var more doctor.Engine
		decodeErr := lines.Decode(&more)
		if errors.Is(decodeErr, io.EOF) {
			break
		}
		if decodeErr != nil {
			return e, errors.Join(err, decodeErr)
		}
		e = more
	}
	if e.NoGPU != "" && last != "" { // the library's own words say more
		e.NoGPU = last
	}
	return e, err
}

// summary counts what is not well.
func summary(checks []doctor.Check) string {
	counts := map[doctor.Status]int{}
	for _, c := range checks {
		counts[c.Status]++
	}
	var parts []string
	for _, status := range []doctor.Status{doctor.Problem, doctor.Warning} {
		if counts[status] > 0 {
			parts = append(parts, english.Plural(counts[status], string(status), ""))
		}
	}
	if parts == nil {
		return "all is well"
	}
	return strings.Join(parts, ", ")
}

// printChecks writes a line for each check, and under those that are not well what to do.
func printChecks(w io.Writer, checks []doctor.Check, asJSON bool) error {
	if asJSON {
		out := json.NewEncoder(w)
		out.SetEscapeHTML(false)
		out.SetIndent("", "  ")
		return out.Encode(struct {
			Status doctor.Status  `json:"status"`
			Checks []doctor.Check `json:"checks"`
		}{doctor.Worst(checks), checks})
	}
	width := 0
	if f, ok := w.(*os.File); ok && isTerminal(w) {
		width, _, _ = term.GetSize(int(f.Fd()))
	}
	if _, err := fmt.Fprintln(w, checkTable(checks, width)); err != nil {
		return err
	}
	if doctor.Worst(checks) == doctor.Problem { // then it is the command's error
		return nil
	}
	_, err := fmt.Fprintf(w, "\n%s\n", summary(checks))
	return err
}

// checkTable breaks lines at words for a terminal of so many columns; 0 does not break them.
func checkTable(checks []doctor.Check, width int) string {
	t := plainTable()
	t.SuppressTrailingSpaces()
	names := 0
	for _, c := range checks {
		names = max(names, text.StringWidth(c.Name))
	}
	if room := width - names - len(doctor.Warning) - 6; width > 0 && room >= 20 {
		t.SetColumnConfigs([]table.ColumnConfig{{Number: 3, WidthMax: room, WidthMaxEnforcer: wrap}})
	}
	for _, c := range checks {
		found := c.Found
		if c.Fix != "" {
			found += "\nfix: " + c.Fix
		}
		t.AppendRow(table.Row{c.Status, c.Name, found})
	}
	return t.Render()
}

// wrap breaks each line of s by itself: text.WrapSoft joins them.
func wrap(s string, columns int) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = text.WrapSoft(line, columns)
	}
	return strings.Join(lines, "\n")
}
