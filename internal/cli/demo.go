package cli

import (
	"bufio"
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
	"syscall"
	"time"

	"github.com/dustin/go-humanize/english"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/client"
	"github.com/hone-llm/hone/finetune"
)

// demoOptions is what `hone demo` is told.
type demoOptions struct {
	examples, out, keep, model string
	questions, rows            int
	expectPoints               int
	hone                       map[string]json.RawMessage
}

func newDemoCommand(s streams) *cobra.Command {
	opts := demoOptions{hone: map[string]json.RawMessage{}}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole story: base accuracy, fine-tuning, tuned accuracy",
		Long: "Starts a server over a throw-away data directory, answers the example questions with the base model, tunes it on the\n" +
			"example training rows, answers again with the tuned model, and compares. Ctrl-C ends everything at any point.\n\n" +
			"The options of training that `hone finetune create` has are taken too, as --num-train-epochs 1.",
		Args: wrongUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.expectPoints < 0 || opts.expectPoints > 100 {
				return usageError{fmt.Errorf("--expect-points is %d, expected 0 to 100", opts.expectPoints)}
			}
			return demo(cmd.Context(), s, opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.examples, "examples", filepath.Join("examples", "mcq"), "directory of train.csv, test.csv and test_answers.csv")
	f.StringVar(&opts.out, "out", filepath.Join("build", "demo"), "directory for the files that the demo writes")
	f.StringVar(&opts.keep, "keep", "", "data directory to use and to leave there, with the tuned model in it")
	f.StringVar(&opts.model, "model", "SmolLM2-135M-Instruct", "the base model")
	f.IntVar(&opts.questions, "questions", 0, "answer only this many test questions (default: all)")
	f.IntVar(&opts.rows, "rows", 0, "train on only this many rows (default: all)")
	f.IntVar(&opts.expectPoints, "expect-points", 0, "fail unless tuning gains this many percentage points of accuracy (default: whatever it gains will do)")
	addOptionFlags(f, opts.hone)
	for _, option := range finetune.KnownOptions() {
		f.Lookup(flagName(option.Name)).Hidden = true
	}
	return cmd
}

// demo tells the story. Whatever happens, no process is left when it returns, and no throw-away data directory.
func demo(ctx context.Context, s streams, opts demoOptions) (err error) {
	trainCSV, testCSV := filepath.Join(opts.examples, "train.csv"), filepath.Join(opts.examples, "test.csv")
	answersCSV := filepath.Join(opts.examples, "test_answers.csv")
	for _, path := range []string{trainCSV, testCSV, answersCSV} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w: run the demo in the repository, or name the directory with --examples", err)
		}
	}
	if err := os.MkdirAll(opts.out, 0o755); err != nil {
		return err
	}
	home := opts.keep
	if home == "" {
		if home, err = os.MkdirTemp("", "hone-demo-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(home)) }()
	}
	chapter := func(format string, args ...any) { fmt.Fprintf(s.out, "\n== "+format+"\n", args...) }

	chapter("hone serve --port 0 --data-dir %s", home)
	log := filepath.Join(opts.out, "serve.log")
	server, err := startServer(ctx, home, log)
	if err != nil {
		return err
	}
	defer func() {
		stopErr := server.stop()
		if err == nil {
			err = stopErr
		}
	}()
	// A server that dies ends the demo at once, with its own words.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		<-server.done
		cancel(fmt.Errorf("the server ended: %w; its log is %s", server.failure(), log))
	}()
	defer func() {
		if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause // without what it interrupted
		}
	}()
	fmt.Fprintf(s.out, "listening on %s, log in %s\n", server.url, log)
	c := client.New(server.url+"/v1", os.Getenv("HONE_API_KEY"))

	chapter("hone predict --model %s --questions %s --out %s", opts.model, testCSV, filepath.Join(opts.out, "base.csv"))
	base, err := predict(ctx, s, c, predictOptions{model: opts.model, questions: testCSV, answers: answersCSV,
		out: filepath.Join(opts.out, "base.csv"), concurrency: 8, overwrite: true, limit: opts.questions})
	if err != nil {
		return err
	}
	fmt.Fprint(s.out, base)

	data := filepath.Join(opts.out, "data")
	chapter("hone dataset mcq --in %s --out %s", trainCSV, data)
	set, err := makeDataset(datasetOptions{in: trainCSV, out: data, valid: 0.15, seed: 1, limit: opts.rows})
	if err != nil {
		return err
	}
	fmt.Fprint(s.out, set)

	chapter("hone finetune create %s --validation-file %s --model %s --suffix quiz --watch", set.train.path, set.valid.path, opts.model)
	request, err := jobRequest(ctx, s, c, jobOptions{model: opts.model, training: set.train.path, validation: set.valid.path, suffix: "quiz", hone: opts.hone, seed: 1, seedSet: true})
	if err != nil {
		return err
	}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	fmt.Fprintf(s.out, "the same with curl:\n  curl %s/v1/files -F purpose=fine-tune -F file=@%s\n  curl %s/v1/fine_tuning/jobs -H 'Content-Type: application/json' -d %s\n",
		server.url, set.train.path, server.url, shellQuote(string(body)))
	job, err := c.CreateJob(ctx, request)
	if err != nil {
		return err
	}
	start := time.Now()
	if job, err = watchJob(ctx, s, c, job.ID); err != nil {
		return err
	}
	trained := time.Since(start)
	fmt.Fprintf(s.out, "%s in %s", *job.FineTunedModel, clock(trained))
	if job.TrainedTokens != nil {
		fmt.Fprintf(s.out, ", %d tokens trained, %.0f tokens/s", *job.TrainedTokens, float64(*job.TrainedTokens)/trained.Seconds())
	}
	fmt.Fprintln(s.out)

	submission := filepath.Join(opts.out, "submission.csv")
	chapter("hone predict --model %s --questions %s --out %s", *job.FineTunedModel, testCSV, submission)
	tuned, err := predict(ctx, s, c, predictOptions{model: *job.FineTunedModel, questions: testCSV, answers: answersCSV, out: submission,
		concurrency: 8, overwrite: true, limit: opts.questions})
	if err != nil {
		return err
	}
	fmt.Fprint(s.out, tuned)

	chapter("base against tuned, on %s of words that training never saw", english.Plural(len(tuned.predictions), "question", ""))
	fmt.Fprintln(s.out, comparison(base, tuned))
	onlyBase, onlyTuned := discordant(base, tuned)
	fmt.Fprintf(s.out, "right with the base model only: %d, with the tuned one only: %d; McNemar's exact test: p %s\n",
		onlyBase, onlyTuned, pValue(client.McNemar(onlyBase, onlyTuned)))
	chapter("what to type next")
	fmt.Fprint(s.out, nextSteps(opts, *job.FineTunedModel))
	return checkGain(base, tuned, opts.expectPoints)
}

// checkGain returns an error unless the second run's accuracy is this many percentage points above the first's, and the
// difference is no chance (McNemar's p below 0.001). With points 0 nothing is expected.
func checkGain(base, tuned *predictResult, points int) error {
	if points == 0 {
		return nil
	}
	baseRight, known := base.right()
	tunedRight, tunedKnown := tuned.right()
	if known == 0 || known != tunedKnown {
		return fmt.Errorf("--expect-points %d: the right answers of %d questions are known with the base model and of %d with the tuned one", points, known, tunedKnown)
	}
	gain := 100 * float64(tunedRight-baseRight) / float64(known)
	if p := client.McNemar(discordant(base, tuned)); gain < float64(points) || p >= 0.001 {
		return fmt.Errorf("tuning changed the accuracy by %+.1f points (McNemar's exact test: p %s), expected at least %+d with p < 0.001", gain, pValue(p), points)
	}
	return nil
}

// comparison is the table of the two runs.
func comparison(runs ...*predictResult) string {
	t := table.NewWriter()
	style := table.StyleLight
	style.Format.Header = text.FormatDefault
	t.SetStyle(style)
	t.AppendHeader(table.Row{"model", "accuracy [95% interval]", "A", "B", "C", "D", "invalid", "seconds", "questions/s"})
	for _, r := range runs {
		right, known := r.right()
		counts, none := r.letters()
		accuracy := "-"
		if known > 0 {
			accuracy = percentInterval(right, known)
		}
		t.AppendRow(table.Row{r.model, accuracy, counts[0], counts[1], counts[2], counts[3], none,
			fmt.Sprintf("%.1f", r.took.Seconds()), fmt.Sprintf("%.2f", r.rate())})
	}
	return t.Render()
}

// discordant counts the questions that only one of two runs over the same questions got right.
func discordant(first, second *predictResult) (onlyFirst, onlySecond int) {
	right := map[string]bool{}
	for _, p := range first.predictions {
		right[p.Question.ID] = p.Answer != "" && p.Answer == first.gold[p.Question.ID]
	}
	for _, p := range second.predictions {
		switch ok := p.Answer != "" && p.Answer == second.gold[p.Question.ID]; {
		case ok && !right[p.Question.ID]:
			onlySecond++
		case !ok && right[p.Question.ID]:
			onlyFirst++
		}
	}
	return onlyFirst, onlySecond
}

func pValue(p float64) string {
	if p < 0.001 {
		return "< 0.001"
	}
	return fmt.Sprintf("= %.3f", p)
}

func nextSteps(opts demoOptions, tuned string) string {
	model, serve := opts.model, "bin/hone serve"
	var b strings.Builder
	if opts.keep != "" {
		model, serve = tuned, "bin/hone serve --data-dir "+shellQuote(opts.keep)
		fmt.Fprintf(&b, "The tuned model is kept in %s.\n", opts.keep)
	} else {
		fmt.Fprintf(&b, "The tuned model went with the throw-away data directory; bin/hone demo --keep DIR keeps it, and the lines below then\n"+
			"work with its name too. The answers are in %s, the training rows in %s.\n", filepath.Join(opts.out, "submission.csv"), filepath.Join(opts.out, "data"))
	}
	fmt.Fprintf(&b, `
Serve:
  %s

Ask it with curl:
  curl %s/chat/completions -H 'Content-Type: application/json' -d '{"model": "%s", "messages": [{"role": "user", "content": "Which of these is a fruit?\nA. hammer\nB. apple\nC. copper\nD. violin"}], "guided_choice": ["A", "B", "C", "D"]}'

Or from Python (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="%s", api_key="any")
  messages = [{"role": "user", "content": "What is the capital of France?"}]
  answer = client.chat.completions.create(model="%s", messages=messages)
  print(answer.choices[0].message.content)
`, serve, client.DefaultBaseURL, model, client.DefaultBaseURL, model)
	return b.String()
}

// shellQuote writes a word as a shell reads it back.
func shellQuote(word string) string {
	if word != "" && strings.Trim(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=@") == "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// serverProcess is `hone serve` as a child of this process, which it does not outlive.
type serverProcess struct {
	url  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how it ended; read after done
}

// listening begins the line with which hone serve says its address.
const listening = "listening on "

// startServer starts a server on a free loopback port, and waits until it listens. Its log goes to a file.
func startServer(ctx context.Context, home, log string) (*serverProcess, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	logFile, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer logFile.Close() // the child has its own descriptor
	// Not ended by ctx, which would kill it: stop ends it in order.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), exe, "serve", "--host", "127.0.0.1", "--port", "0", "--data-dir", home)
	cmd.Stderr = logFile
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true, // a terminal's Ctrl-C is for this process, which then stops the server in order
		Pdeathsig: syscall.SIGTERM,
	}
	p := &serverProcess{cmd: cmd, done: make(chan struct{})}
	started, ready := make(chan error, 1), make(chan string, 1)
	go func() {
		// Pdeathsig follows the thread that forked, so it is kept until the child has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			if url, ok := strings.CutPrefix(lines.Text(), listening); ok {
				select {
				case ready <- url:
				default:
				}
			}
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s serve: %w", exe, err)
	}
	select {
	case p.url = <-ready:
		return p, nil
	case <-p.done:
		return nil, fmt.Errorf("the server did not start: %w\n%s", p.failure(), tail(log))
	case <-ctx.Done():
		return nil, errors.Join(context.Cause(ctx), p.stop())
	}
}

// failure says how the server ended. It is called after done.
func (p *serverProcess) failure() error {
	if p.err == nil {
		return errors.New("exit status 0")
	}
	return p.err
}

// stop ends the server and returns once it is gone: in order, then at once, then by force.
func (p *serverProcess) stop() error {
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGTERM, 8 * time.Second}, {syscall.SIGTERM, 5 * time.Second}, {syscall.SIGKILL, 5 * time.Second}} {
		select {
		case <-p.done:
			return nil
		default:
		}
		_ = p.cmd.Process.Signal(step.signal) // an error means that it has ended
		select {
		case <-p.done:
			return nil
		case <-time.After(step.wait):
		}
	}
	return fmt.Errorf("the server (process %d) does not end", p.cmd.Process.Pid)
}

// tail returns the last lines of a log.
func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 2000
	if info, err := f.Stat(); err == nil && info.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return ""
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
