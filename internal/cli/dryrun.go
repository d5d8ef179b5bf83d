package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/client"
	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/finetune"
	"github.com/hone-llm/hone/internal/app"
	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/graph"
	"github.com/hone-llm/hone/internal/store"
)

// dryRun shows what `hone finetune create` would start.
func dryRun(cmd *cobra.Command, s streams, opts jobOptions) error {
	ctx := cmd.Context()
	c, stop, err := anyServer(cmd, s)
	if err != nil {
		return err
	}
	defer stop()
	request, err := jobRequest(ctx, s, c, opts)
	var result client.FineTuningDryRun
	if err == nil {
		result, err = c.DryRun(ctx, request)
	}
	removeUploads(ctx, s, c, opts, request)
	if err != nil {
		return err
	}
	return printDryRun(s.out, result)
}

// anyServer returns a client of the running server or, where none was named and none runs, of one that it starts over the
// data directory, without letting its jobs go on. The caller calls stop.
func anyServer(cmd *cobra.Command, s streams) (c *client.Client, stop func(), err error) {
	ctx := cmd.Context()
	if c, err = newClient(cmd); err != nil {
		return nil, nil, err
	}
	named := cmd.Flags().Changed("base-url") || os.Getenv("HONE_BASE_URL") != ""
	var dial *net.OpError
	if _, _, err := c.Jobs(ctx, "", 1); named || !errors.As(err, &dial) || dial.Op != "dial" {
		return c, func() {}, nil // whatever is wrong, the request itself will say
	}
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return nil, nil, err
	}
	cfg, err := configs.Load(configs.Sources{File: file, Flags: map[string]any{"host": "127.0.0.1", "port": 0, "default_model": ""}})
	if err != nil {
		return nil, nil, err
	}
	// Nobody else is to use it, and a certificate need not be of 127.0.0.1.
	key := newKey()
	cfg.APIKey, cfg.Keys, cfg.TLS = key, nil, configs.TLS{}
	a := app.New(cfg, app.Options{Logger: plainLogger(s.err), Stderr: s.err, Trainable: graph.Trainable, IdleJobs: true})
	if err := a.Start(ctx); err != nil {
		if errors.As(err, new(*store.InUseError)) {
			err = fmt.Errorf("%w; if that is a server, say with --base-url where it listens", err)
		}
		return nil, nil, err
	}
	stop = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownGrace)
		defer cancel()
		if err := a.Stop(ctx); err != nil {
			fmt.Fprintln(s.err, "stopped, but not in order:", err)
		}
	}
	return client.New(a.URL()+"/v1", key), stop, nil
}

// printDryRun shows the rows, the plan with what was decided for the user, and the memory.
func printDryRun(w io.Writer, r client.FineTuningDryRun) error {
	var plan child.TrainPlan
	var requested map[string]json.RawMessage
	if err := errors.Join(json.Unmarshal(r.Plan, &plan), json.Unmarshal(r.Options, &requested)); err != nil {
		return fmt.Errorf("the answer is not what hone sends: %w", err)
	}
	t := plainTable()
	base := r.Model
	if r.StartAdapter != "" {
		base += ", going on from " + r.StartAdapter
	}
	t.AppendRow(table.Row{"model", base})
	t.AppendRow(table.Row{"method", r.Method.Type})
	training := fmt.Sprintf("%s rows, %s tokens an epoch", humanize.Comma(int64(r.TrainRows)), humanize.Comma(int64(r.TrainTokens)))
	if r.SharedTokens > 0 {
		training += fmt.Sprintf(", of which %s (%.0f%%) are shared and computed once", humanize.Comma(int64(r.SharedTokens)), 100*float64(r.SharedTokens)/float64(r.TrainTokens))
	}
	t.AppendRow(table.Row{"training", training})
	if r.ValidRows > 0 {
		t.AppendRow(table.Row{"validation", fmt.Sprintf("%s rows, %s tokens", humanize.Comma(int64(r.ValidRows)), humanize.Comma(int64(r.ValidTokens)))})
	}
	t.AppendRow(table.Row{"long rows", fmt.Sprintf("%d left out, %d lose the beginning of their prompt", r.DroppedRows, r.TruncatedRows)})
	t.AppendRow(table.Row{"steps", fmt.Sprintf("%s, in %d epochs of %s rows a step", humanize.Comma(int64(plan.TotalSteps)), plan.NumTrainEpochs, humanize.Comma(int64(plan.BatchSize)))})
	for _, note := range r.Notes {
		t.AppendRow(table.Row{"note", note})
	}
	fmt.Fprintf(w, "%s\n\n%s\n\n%s\n", t.Render(), planTable(plan, requested), memoryTable(plan.Memory))
	_, err := fmt.Fprintln(w, "Nothing was started.")
	return err
}

// planTable lists the options as the plan has decided them, those that were asked for and are not in the plan as they were
// asked for, and which nobody asked for.
func planTable(plan child.TrainPlan, requested map[string]json.RawMessage) string {
	decided := map[string]string{}
	value := reflect.ValueOf(plan)
	for i := range value.NumField() {
		name, tag, _ := strings.Cut(value.Type().Field(i).Tag.Get("json"), ",")
		field := value.Field(i)
		switch {
		case field.Kind() == reflect.Struct: // the memory has a table of its own
		case field.IsZero() && tag == "omitempty": // of another method, or nothing at all
		case field.Kind() == reflect.Slice:
			decided[name] = strings.Trim(fmt.Sprint(field), "[]")
		default:
			decided[name] = fmt.Sprint(field)
		}
	}
	t := plainTable()
	t.AppendHeader(table.Row{"option", "value", ""})
	for _, option := range finetune.KnownOptions() {
		shown, known := decided[option.Name]
		raw, asked := requested[option.Name]
		switch {
		case asked && !known:
			t.AppendRow(table.Row{option.Name, text.Snip(string(raw), 60, "..."), ""})
		case asked:
			t.AppendRow(table.Row{option.Name, shown, ""})
		case known:
			t.AppendRow(table.Row{option.Name, shown, "auto"})
		}
	}
	return t.Render()
}

func memoryTable(m child.MemoryPlan) string {
	size := func(n int64) string { return humanize.IBytes(uint64(max(0, n))) }
	t := plainTable()
	t.AppendHeader(table.Row{"memory", "", ""})
	t.AppendRow(table.Row{"together", size(m.TotalBytes), fmt.Sprintf("of %s on %s", size(m.FreeBytes), m.Device)})
	t.AppendRow(table.Row{"weights", size(m.WeightBytes), fmt.Sprintf("layout %s: %s, transposed %s", m.Layout, m.Forward, m.Backward)})
	t.AppendRow(table.Row{"adapter", size(m.AdapterBytes), "weights, gradients, moments"})
	activations := fmt.Sprintf("%d tokens at once", m.MicroBatchTokens)
	if m.Recompute {
		activations += ", computed again in the backward pass"
	}
	t.AppendRow(table.Row{"activations", size(m.ActivationBytes), activations})
	t.AppendRow(table.Row{"the rest", size(m.OverheadBytes), "process, data, device context"})
	return t.Render()
}
