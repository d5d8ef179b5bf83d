package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/client"
)

func newFineTuneCommand(s streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "finetune",
		Short: "Create, follow, pause and cancel fine-tuning jobs of a running server",
		Args:  wrongUsage(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newFineTuneCreateCommand(s), newFineTuneListCommand(s), newFineTuneWatchCommand(s),
		newFineTuneActCommand(s, "cancel", "End a job", (*client.Client).CancelJob),
		newFineTuneActCommand(s, "pause", "Let a job wait until it is resumed: a running one saves its state", (*client.Client).PauseJob),
		newFineTuneActCommand(s, "resume", "Let a paused job go on", (*client.Client).ResumeJob),
		newFineTuneCheckpointsCommand(s))
	for _, sub := range cmd.Commands() {
		addServerFlags(sub)
	}
	return cmd
}

// jobOptions is what `hone finetune create` is told.
type jobOptions struct {
	model, training, validation, method, suffix, template string
	seed                                                  int64
	seedSet                                               bool
	hone                                                  map[string]json.RawMessage // by the names of the `hone` object
}

func newFineTuneCreateCommand(s streams) *cobra.Command {
	opts := jobOptions{hone: map[string]json.RawMessage{}}
	var watch, dry bool
	cmd := &cobra.Command{
		Use:   "create FILE --model MODEL",
		Short: "Upload a training file and start a job",
		Long: "FILE is JSON Lines, or the id of an uploaded file (file-...). A line is {\"messages\": [...]}, {\"prompt\": ..., \"completion\": ...}\n" +
			"or {\"text\": ...}; with --method dpo, {\"prompt\": ..., \"chosen\": ..., \"rejected\": ...} or OpenAI's form of it. MODEL is a base\n" +
			"model, or a tuned one (ft:...) to go on from. What is not said is \"auto\"; the names are PEFT's, Hugging Face Trainer's and TRL's.",
		Example: "  hone finetune create data/train.jsonl --validation-file data/valid.jsonl --model SmolLM2-135M-Instruct --suffix quiz --watch\n" +
			"  hone finetune create data/train.jsonl --model llama-8b --r 8 --target-modules q_proj,v_proj --learning-rate 2e-4 --dry-run",
		Args: wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.training, opts.seedSet = args[0], cmd.Flags().Changed("seed")
			if dry {
				return dryRun(cmd, s, opts)
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			request, err := jobRequest(cmd.Context(), s, c, opts)
			var job client.FineTuningJob
			if err == nil {
				job, err = c.CreateJob(cmd.Context(), request)
			}
			if err != nil {
				removeUploads(cmd.Context(), s, c, opts, request)
				return err
			}
			fmt.Fprintln(s.out, job.ID)
			if !watch {
				return nil
			}
			return follow(cmd.Context(), s, c, job.ID)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&opts.model, "model", "", "the model to tune")
	f.StringVar(&opts.validation, "validation-file", "", "file of rows to measure on and not to train on")
	f.StringVar(&opts.method, "method", "", "supervised or dpo (default: supervised)")
	f.StringVar(&opts.suffix, "suffix", "", "part of the tuned model's name")
	f.Int64Var(&opts.seed, "seed", 0, "seed of the job (default: the server chooses one)")
	f.StringVar(&opts.template, "template", "", "file with the wording of the questions, for hone predict (default: as hone dataset recorded it)")
	f.BoolVar(&watch, "watch", false, "follow the job until it ends")
	f.BoolVar(&dry, "dry-run", false, "check the files, decide every \"auto\", estimate the memory, and start nothing; needs no server")
	addOptionFlags(f, opts.hone)
	_ = cmd.MarkFlagRequired("model") // an error means that there is no such flag
	return cmd
}

// jobRequest puts the request of a job together and, once all else is known to be right, uploads the files. After an error
// the request has the ids of those that were uploaded.
func jobRequest(ctx context.Context, s streams, c *client.Client, opts jobOptions) (client.FineTuningJobRequest, error) {
	request := client.FineTuningJobRequest{Model: opts.model}
	if err := checkOptions(opts); err != nil {
		return request, err
	}
	if opts.method != "" {
		request.Method = &client.FineTuningMethod{Type: opts.method}
	}
	template, err := readTemplate(opts.template)
	if err != nil {
		return request, err
	}
	if opts.suffix != "" {
		request.Suffix = &opts.suffix
	}
	if opts.seedSet {
		request.Seed = &opts.seed
	}
	training, err := readTraining(opts.training)
	if err != nil {
		return request, err
	}
	var validation trainingFile
	if opts.validation != "" {
		if validation, err = readTraining(opts.validation); err != nil {
			return request, err
		}
	}
	if template == "" {
		template = training.template
	}
	options := maps.Clone(opts.hone)
	if options == nil {
		options = map[string]json.RawMessage{}
	}
	if _, ok := options["question_template"]; !ok && template != "" {
		if options["question_template"], err = json.Marshal(template); err != nil {
			return request, err
		}
	}
	if len(options) > 0 {
		if request.Hone, err = json.Marshal(options); err != nil {
			return request, err
		}
	}
	if _, err := c.Model(ctx, opts.model); err != nil {
		return request, fmt.Errorf("model %q: %w", opts.model, err)
	}
	if request.TrainingFile, err = training.upload(ctx, s, c); err != nil {
		return request, err
	}
	if opts.validation != "" {
		id, err := validation.upload(ctx, s, c)
		if err != nil {
			return request, err
		}
		request.ValidationFile = &id
	}
	return request, nil
}

// trainingFile is a file of rows that is here, or one that was uploaded before.
type trainingFile struct {
	path     string // or an id, if uploaded
	data     []byte
	template string // the question template that was recorded beside it
	uploaded bool
}

// readTraining reads a file; what is not there but looks like the id of an uploaded one is taken for that.
func readTraining(path string) (trainingFile, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(path, "file-") {
		return trainingFile{path: path, uploaded: true}, nil
	}
	if err != nil {
		return trainingFile{}, err
	}
	template, err := readRecipe(path, data)
	return trainingFile{path: path, data: data, template: template}, err
}

// upload sends the file and returns its id.
func (f trainingFile) upload(ctx context.Context, s streams, c *client.Client) (id string, err error) {
	if f.uploaded {
		return f.path, nil
	}
	file, err := c.UploadFile(ctx, filepath.Base(f.path), f.data)
	if err != nil {
		return "", fmt.Errorf("upload %s: %w", f.path, err)
	}
	fmt.Fprintf(s.err, "uploaded %s as %s\n", f.path, file.ID)
	return file.ID, nil
}

// removeUploads deletes what was uploaded for a job that was not created, also after Ctrl-C. If the job was created after
// all, and only the answer got lost, the server refuses to.
func removeUploads(ctx context.Context, s streams, c *client.Client, opts jobOptions, request client.FineTuningJobRequest) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	remove := func(path, id string) {
		if id == "" || id == path { // not uploaded, or not by this command
			return
		}
		if err := c.DeleteFile(ctx, id); err != nil {
			fmt.Fprintf(s.err, "%s, which was uploaded as %s, stays there: %v\n", path, id, err)
			return
		}
		fmt.Fprintf(s.err, "deleted the upload %s again\n", id)
	}
	remove(opts.training, request.TrainingFile)
	if request.ValidationFile != nil {
		remove(opts.validation, *request.ValidationFile)
	}
}

func newFineTuneListCommand(s streams) *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the jobs, newest first",
		Args:    wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			jobs, more, err := c.Jobs(cmd.Context(), "", limit)
			if err != nil {
				return err
			}
			if len(jobs) == 0 {
				_, err := fmt.Fprintln(s.out, "there are no jobs yet: start one with `hone finetune create`")
				return err
			}
			fmt.Fprintln(s.out, jobTable(jobs))
			if more {
				fmt.Fprintf(s.out, "there are more; --limit %d shows them\n", 2*limit)
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 20, "how many to show")
	return cmd
}

func jobTable(jobs []client.FineTuningJob) string {
	t := plainTable()
	t.AppendHeader(table.Row{"job", "status", "base model", "tuned model", "created", "progress"})
	for _, j := range jobs {
		tuned, progress := "", ""
		if j.FineTunedModel != nil {
			tuned = *j.FineTunedModel
		}
		switch {
		case j.Error != nil:
			progress = text.Snip(strings.Join(strings.Fields(j.Error.Message), " "), 100, "...")
		case j.Hone != nil && j.Hone.Progress != nil && j.Hone.Progress.TotalSteps > 0:
			progress = fmt.Sprintf("step %d of %d", j.Hone.Progress.Step, j.Hone.Progress.TotalSteps)
		}
		if j.Hone != nil && j.Hone.Paused != "" {
			progress = strings.TrimSpace("paused " + progress)
		}
		t.AppendRow(table.Row{j.ID, j.Status, j.Model, tuned, time.Unix(j.CreatedAt, 0).Format("2006-01-02 15:04"), progress})
	}
	return t.Render()
}

func plainTable() table.Writer {
	t := table.NewWriter()
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Format.Header = text.FormatUpper
	t.SetStyle(style)
	return t
}

func newFineTuneWatchCommand(s streams) *cobra.Command {
	return &cobra.Command{
		Use:   "watch JOB",
		Short: "Follow a job until it ends",
		Args:  wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			return follow(cmd.Context(), s, c, args[0])
		},
	}
}

// newFineTuneActCommand is a command that does one thing to a job.
func newFineTuneActCommand(s streams, name, short string, act func(c *client.Client, ctx context.Context, id string) (client.FineTuningJob, error)) *cobra.Command {
	return &cobra.Command{
		Use:   name + " JOB",
		Short: short,
		Args:  wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			job, err := act(c, cmd.Context(), args[0])
			if err != nil {
				return err
			}
			status := job.Status
			if job.Hone != nil && job.Hone.Paused != "" {
				status += " (paused)"
			}
			_, err = fmt.Fprintln(s.out, job.ID, status)
			return err
		},
	}
}

func newFineTuneCheckpointsCommand(s streams) *cobra.Command {
	return &cobra.Command{
		Use:   "checkpoints JOB",
		Short: "List the checkpoints of a job, newest first: each is a model that can be used",
		Args:  wrongUsage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			checkpoints, _, err := c.Checkpoints(cmd.Context(), args[0], "", 1000)
			if err != nil {
				return err
			}
			if len(checkpoints) == 0 {
				_, err := fmt.Fprintln(s.out, "the job has no checkpoints")
				return err
			}
			t := plainTable()
			t.AppendHeader(table.Row{"step", "model", "created", "training loss", "validation loss", "choice accuracy"})
			for _, p := range checkpoints {
				var m struct {
					TrainLoss      *float64 `json:"train_loss"`
					ValidLoss      *float64 `json:"full_valid_loss"`
					ChoiceAccuracy *float64 `json:"valid_choice_accuracy"`
				}
				if err := json.Unmarshal(p.MetricsAtPoint, &m); err != nil {
					return fmt.Errorf("metrics of %s: %w", p.ID, err)
				}
				t.AppendRow(table.Row{p.StepNumber, p.Model, time.Unix(p.CreatedAt, 0).Format("2006-01-02 15:04"),
					measured(m.TrainLoss), measured(m.ValidLoss), measured(m.ChoiceAccuracy)})
			}
			_, err = fmt.Fprintln(s.out, t.Render())
			return err
		},
	}
}

// measured shows a number that may not have been measured.
func measured(v *float64) string {
	if v == nil {
		return ""
	}
	return strconv.FormatFloat(*v, 'f', 4, 64)
}

// follow shows a job until it ends and prints the tuned model's name. A job that did not succeed is an error.
func follow(ctx context.Context, s streams, c *client.Client, id string) error {
	job, err := watchJob(ctx, s, c, id)
	if err != nil {
		if ctx.Err() != nil {
			fmt.Fprintf(s.err, "the job goes on: hone finetune watch %s follows it, hone finetune cancel %s ends it\n", id, id)
		}
		return err
	}
	_, err = fmt.Fprintln(s.out, *job.FineTunedModel)
	return err
}

// watchJob shows a job until it ends: its events as lines, its steps as a bar. It returns a job that succeeded.
func watchJob(ctx context.Context, s streams, c *client.Client, id string) (client.FineTuningJob, error) {
	w := &jobWatch{ctx: ctx, client: c, streams: s, id: id}
	job, err := c.WatchJob(ctx, id, 500*time.Millisecond, w.update)
	if w.bar != nil {
		w.bar.end(err == nil && job.Status == "succeeded")
	}
	switch {
	case err != nil:
		return job, err
	case job.Status == "succeeded" && job.FineTunedModel != nil:
		return job, nil
	case job.Error != nil && job.Error.Message != "":
		return job, fmt.Errorf("job %s %s: %s", id, job.Status, job.Error.Message)
	}
	return job, fmt.Errorf("job %s: %s", id, job.Status)
}

// jobWatch is what watchJob knows of a job between two looks.
type jobWatch struct {
	ctx     context.Context // of the watch: update is called from within it
	client  *client.Client
	streams streams
	id      string
	bar     *meter
	event   string // id of the newest event that was shown
	looked  time.Time
}

// stepUnits are the parts that a step is counted in, so that the bar moves inside a step too.
const stepUnits = 1000

func (w *jobWatch) update(job client.FineTuningJob) {
	w.showEvents()
	if job.Hone == nil || job.Hone.Progress == nil || job.Hone.Progress.TotalSteps == 0 || job.Status != "running" {
		return
	}
	p := *job.Hone.Progress
	done := int64(p.Step)*stepUnits + int64(p.StepFraction*stepUnits)
	if w.bar == nil {
		w.bar = newMeter(w.streams.err, "training", int64(p.TotalSteps)*stepUnits, done)
	}
	w.looked = time.Now()
	looked := w.looked
	w.bar.eta(func() time.Duration {
		return max(0, time.Duration(p.SecondsLeft*float64(time.Second))-time.Since(looked))
	})
	w.bar.set(done, jobNote(p))
}

func jobNote(p client.FineTuningProgress) string {
	note := fmt.Sprintf("step %d/%d", p.Step, p.TotalSteps)
	if p.TrainLoss != nil {
		note += fmt.Sprintf("  loss %.3f", *p.TrainLoss)
	}
	if p.ValidLoss != nil {
		note += fmt.Sprintf("  valid loss %.3f", *p.ValidLoss)
	}
	if p.ValidAccuracy != nil {
		note += fmt.Sprintf(" acc %.1f%%", 100**p.ValidAccuracy)
	}
	if p.ValidChoiceAccuracy != nil {
		note += fmt.Sprintf(" choices %.1f%%", 100**p.ValidChoiceAccuracy)
	}
	if p.TokensPerSecond > 0 {
		note += fmt.Sprintf("  %.0f tokens/s", p.TokensPerSecond)
	}
	return note
}

// showEvents prints what the job's log has gained, without the lines of single steps, which the bar shows.
func (w *jobWatch) showEvents() {
	var fresh []client.FineTuningJobEvent
	for after := ""; ; {
		page, more, err := w.client.Events(w.ctx, w.id, after, 50)
		if err != nil {
			return // the next look gets them
		}
		for _, e := range page {
			if e.ID == w.event {
				more = false
				break
			}
			fresh = append(fresh, e)
			after = e.ID
		}
		if !more || len(page) == 0 {
			break
		}
	}
	if len(fresh) == 0 {
		return
	}
	w.event = fresh[0].ID
	slices.Reverse(fresh)
	for _, e := range fresh {
		if e.Type == "metrics" && !strings.Contains(string(e.Data), `"full_valid_loss"`) && !strings.Contains(string(e.Data), `"valid_choice_accuracy"`) {
			continue
		}
		line := e.Message
		if e.Level != "info" {
			line = e.Level + ": " + line
		}
		if w.bar != nil {
			w.bar.println(line)
		} else {
			fmt.Fprintln(w.streams.err, line)
		}
	}
}
