package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/client"
)

// predictOptions is what `hone predict` is told.
type predictOptions struct {
	model, questions, out string
	template, answers     string // paths; "": none
	encoding              string
	concurrency, limit    int
	details, overwrite    bool
}

func newPredictCommand(s streams) *cobra.Command {
	var opts predictOptions
	cmd := &cobra.Command{
		Use:   "predict --model MODEL --questions FILE --out FILE",
		Short: "Answer a CSV file of multiple-choice questions",
		Long: "Answers every row of a CSV file (columns Question, Option A to Option D and, where there are, ID and Answer) with one of\n" +
			"A, B, C and D, and writes ID,Answer in the order of the questions, each row as soon as it is answered. A run that was\n" +
			"interrupted goes on where it stopped; what it was made from is kept beside the file, with .hone.json at the end of its\n" +
			"name, and a run with another model, template or question file is refused.\n\n" +
			"A tuned model is asked in the words that it was tuned with. Elsewhere the template is\n\n  " +
			strings.ReplaceAll(client.DefaultTemplate, "\n", "\n  "),
		Example: "  hone predict --model SmolLM2-135M-Instruct --questions test.csv --out submission.csv\n" +
			"  hone predict --model ft:... --questions test.csv --out submission.csv --details --encoding gb18030",
		Args: wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			result, err := predict(cmd.Context(), s, c, opts)
			switch {
			case result == nil:
			case result.complete:
				fmt.Fprint(s.out, result)
			case len(result.predictions) > 0:
				fmt.Fprintf(s.err, "%s has %s; the same command, without --overwrite, goes on there\n", opts.out, english.Plural(len(result.predictions), "row", ""))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.model, "model", "", "the model's name, as hone models list shows it, or ft:...")
	f.StringVar(&opts.questions, "questions", "", "CSV file of questions")
	f.StringVar(&opts.out, "out", "", "CSV file to write")
	f.StringVar(&opts.template, "template", "", "file with the wording: {question}, {a}, {b}, {c}, {d}")
	f.IntVar(&opts.concurrency, "concurrency", 8, "questions asked at the same time")
	f.StringVar(&opts.answers, "answers", "", "CSV file with ID and Answer, to measure the accuracy (default: the questions' own Answer column)")
	f.BoolVar(&opts.details, "details", false, "add the probabilities of the four letters and the confidence")
	f.BoolVar(&opts.overwrite, "overwrite", false, "replace the file if it is there")
	f.StringVar(&opts.encoding, "encoding", "", "encoding of the CSV files, as gb18030 or gbk (default: UTF-8)")
	f.IntVar(&opts.limit, "limit", 0, "answer only the first questions, this many (default: all)")
	addServerFlags(cmd)
	for _, name := range []string{"model", "questions", "out"} {
		_ = cmd.MarkFlagRequired(name) // an error means that there is no such flag
	}
	return cmd
}

// predictResult sums up a run. Predictions are all rows of the file, also those of an earlier run.
type predictResult struct {
	model       string
	out         string
	predictions []client.Prediction
	gold        map[string]string // right answers by ID; empty if they are not known
	asked       int               // in this run
	took        time.Duration
	complete    bool // every question has its row
}

// right counts the right answers among the questions whose answer is known.
func (r *predictResult) right() (right, known int) {
	for _, p := range r.predictions {
		if answer := r.gold[p.Question.ID]; answer != "" {
			known++
			if p.Answer == answer {
				right++
			}
		}
	}
	return right, known
}

// letters counts how often each letter was chosen, and the questions without an answer.
func (r *predictResult) letters() (counts [4]int, none int) {
	for _, p := range r.predictions {
		if p.Answer == "" {
			none++
			continue
		}
		counts[p.Answer[0]-'A']++
	}
	return counts, none
}

func (r *predictResult) rate() float64 {
	if r.took <= 0 {
		return 0
	}
	return float64(r.asked) / r.took.Seconds()
}

// String is what the command prints at its end.
func (r *predictResult) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s in %.1f s (%.2f questions/s)", r.out, english.Plural(r.asked, "question", ""), r.took.Seconds(), r.rate())
	if earlier := len(r.predictions) - r.asked; earlier > 0 {
		fmt.Fprintf(&b, ", after %d of an earlier run", earlier)
	}
	counts, none := r.letters()
	fmt.Fprintf(&b, "\nanswers: A %d, B %d, C %d, D %d", counts[0], counts[1], counts[2], counts[3])
	if none > 0 {
		fmt.Fprintf(&b, ", none %d", none)
	}
	b.WriteString("\n")
	if right, known := r.right(); known > 0 {
		fmt.Fprintf(&b, "accuracy: %s (%d of %d)\n", percentInterval(right, known), right, known)
	}
	return b.String()
}

// percentInterval writes a rate with its 95% interval.
func percentInterval(right, n int) string {
	low, high := client.Wilson(right, n)
	return fmt.Sprintf("%.1f%% [%.1f, %.1f]", 100*float64(right)/float64(n), 100*low, 100*high)
}

// predict answers the questions into a file. The result is nil if nothing was asked; after an error it holds what is in
// the file.
func predict(ctx context.Context, s streams, c *client.Client, opts predictOptions) (*predictResult, error) {
	if opts.concurrency < 1 {
		return nil, usageError{fmt.Errorf("--concurrency is %d, expected at least 1", opts.concurrency)}
	}
	for flag, path := range map[string]string{"questions": opts.questions, "answers": opts.answers, "template": opts.template} {
		if path != "" && sameFile(opts.out, path) {
			return nil, usageError{fmt.Errorf("--out %s is the file of --%s, which it would replace; name another", opts.out, flag)}
		}
	}
	template, err := readTemplate(opts.template)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(opts.questions)
	if err != nil {
		return nil, err
	}
	questions, err := client.ParseQuestions(opts.questions, data, client.ReadOptions{Encoding: opts.encoding})
	if err != nil {
		return nil, err
	}
	if opts.limit > 0 {
		questions = questions[:min(opts.limit, len(questions))]
	}
	result := &predictResult{model: opts.model, out: opts.out, gold: map[string]string{}}
	if opts.answers != "" {
		if result.gold, err = client.ReadAnswers(opts.answers, opts.encoding); err != nil {
			return nil, err
		}
	} else {
		for _, q := range questions {
			result.gold[q.ID] = q.Answer
		}
	}
	predictor, err := c.NewPredictor(ctx, client.PredictorOptions{Model: opts.model, Template: template, Concurrency: opts.concurrency})
	if err != nil {
		return nil, err
	}
	if predictor.Warning != "" {
		fmt.Fprintln(s.err, "warning:", predictor.Warning)
	}
	submission, err := client.OpenSubmission(opts.out, client.NewOrigin(predictor, data, len(questions), opts.details), questions, opts.overwrite)
	if err != nil {
		return nil, err
	}
	result.predictions = submission.Done()
	if n := len(result.predictions); n > 0 {
		fmt.Fprintf(s.err, "%s has %d of %s, going on there\n", opts.out, n, english.Plural(len(questions), "row", ""))
	}
	bar := newMeter(s.err, "answering", int64(len(questions)), int64(len(result.predictions)))
	start := time.Now()
	err = predictor.Run(ctx, questions[len(result.predictions):], func(p client.Prediction) error {
		if err := submission.Write(p); err != nil {
			return err
		}
		result.predictions = append(result.predictions, p)
		result.asked++
		result.took = time.Since(start)
		if p.Err != nil {
			bar.println(rowError(opts.questions, p))
		}
		bar.set(int64(len(result.predictions)), fmt.Sprintf("%d/%d  %.1f questions/s", len(result.predictions), len(questions), result.rate()))
		return nil
	})
	bar.end(err == nil)
	err = errors.Join(err, submission.Close())
	if err != nil {
		return result, err
	}
	result.complete = true
	if _, none := result.letters(); none > 0 {
		err = fmt.Errorf("no answer to %d of %s, whose cells in %s are empty", none, english.Plural(len(questions), "question", ""), opts.out)
	}
	return result, err
}

// sameFile says whether two paths lead to one file, which need not exist.
func sameFile(a, b string) bool {
	if absA, err := filepath.Abs(a); err == nil {
		if absB, err := filepath.Abs(b); err == nil && absA == absB {
			return true
		}
	}
	infoA, errA := os.Stat(a)
	infoB, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

func rowError(file string, p client.Prediction) string {
	return fmt.Sprintf("%s:%d: row %d (ID %s): %v", file, p.Question.Line, p.Question.Row, p.Question.ID, p.Err)
}
