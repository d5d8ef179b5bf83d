package cli

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/hone-llm/hone/client"
	"github.com/hone-llm/hone/internal/wire"
)

func newDatasetCommand(s streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dataset",
		Short: "Make training files",
		Args:  wrongUsage(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDatasetMCQCommand(s))
	return cmd
}

// datasetOptions is what `hone dataset mcq` is told.
type datasetOptions struct {
	in, out, template, encoding string
	valid                       float64
	seed                        uint64
	limit                       int
}

func newDatasetMCQCommand(s streams) *cobra.Command {
	var opts datasetOptions
	cmd := &cobra.Command{
		Use:   "mcq --in FILE.csv --out DIR",
		Short: "Turn a CSV file of multiple-choice questions into chat rows for fine-tuning",
		Long: "Reads the columns Question, Option A to Option D and Answer, drops rows with an empty cell and says which, and writes\n" +
			"train.jsonl and valid.jsonl into a directory. If --out ends in .jsonl it names the training file, and the validation\n" +
			"file is called the same with .valid.jsonl at the end.\n\n" +
			"The wording is kept beside the training file; `hone finetune create` gives it to the job, so that `hone predict` asks\n" +
			"the tuned model in the same words.",
		Example: "  hone dataset mcq --in train.csv --out data/",
		Args:    wrongUsage(cobra.NoArgs),
		RunE: func(_ *cobra.Command, _ []string) error {
			result, err := makeDataset(opts)
			if err != nil {
				return err
			}
			fmt.Fprint(s.out, result)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.in, "in", "", "CSV file of questions with answers")
	f.StringVar(&opts.out, "out", "", "directory to write to, or the training file's name")
	f.Float64Var(&opts.valid, "valid", 0.15, "share of the rows that are kept for validation")
	f.Uint64Var(&opts.seed, "seed", 1, "seed of the split")
	f.StringVar(&opts.template, "template", "", "file with the wording: {question}, {a}, {b}, {c}, {d}")
	f.StringVar(&opts.encoding, "encoding", "", "encoding of the CSV file, as gb18030 or gbk (default: UTF-8)")
	for _, name := range []string{"in", "out"} {
		_ = cmd.MarkFlagRequired(name) // an error means that there is no such flag
	}
	return cmd
}

// datasetFile is one file of a dataset, and how often each letter is the answer in it.
type datasetFile struct {
	path    string
	rows    int
	letters [4]int
}

// dataset is what makeDataset did.
type dataset struct {
	in           string
	total        int
	dropped      []client.Question
	duplicates   int
	template     string
	train, valid datasetFile // valid.path is "" if there is none
}

// String is what the command prints at its end.
func (d *dataset) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", d.in, english.Plural(d.total, "row", ""))
	if len(d.dropped) > 0 {
		fmt.Fprintf(&b, ", %d dropped for an empty cell:", len(d.dropped))
		const shown = 20
		for i, q := range d.dropped[:min(shown, len(d.dropped))] {
			if i > 0 {
				b.WriteString(";")
			}
			fmt.Fprintf(&b, " line %d (%s)", q.Line, strings.Join(q.Missing, ", "))
		}
		if len(d.dropped) > shown {
			b.WriteString("; ...")
		}
	}
	b.WriteString("\n")
	if d.duplicates > 0 {
		fmt.Fprintf(&b, "%s, repeating an earlier question with its options, kept on the same side of the split\n", english.Plural(d.duplicates, "row", ""))
	}
	for _, f := range []datasetFile{d.train, d.valid} {
		if f.path != "" {
			fmt.Fprintf(&b, "%s: %s, answers A %d, B %d, C %d, D %d\n", f.path, english.Plural(f.rows, "row", ""), f.letters[0], f.letters[1], f.letters[2], f.letters[3])
		}
	}
	return b.String()
}

// recipe is kept beside a training file: how its questions are worded. It holds for the file of this digest only.
type recipe struct {
	SHA256           string `json:"sha256"`
	QuestionTemplate string `json:"question_template"`
}

func recipePath(trainingFile string) string { return trainingFile + ".hone.json" }

// makeDataset writes the training and validation files. The same options write the same bytes.
func makeDataset(opts datasetOptions) (*dataset, error) {
	if opts.valid < 0 || opts.valid >= 1 {
		return nil, usageError{fmt.Errorf("--valid is %g, expected at least 0 and less than 1", opts.valid)}
	}
	template, err := readTemplate(opts.template)
	if err != nil {
		return nil, err
	}
	if template == "" {
		template = client.DefaultTemplate
	}
	questions, err := client.ReadQuestions(opts.in, client.ReadOptions{Encoding: opts.encoding, NeedAnswer: true, AllowMissing: true})
	if err != nil {
		return nil, err
	}
	d := &dataset{in: opts.in, total: len(questions), template: template}
	// Repeated questions go to one side of the split together: a validation row that was trained on says nothing.
	var groups [][]client.Question
	at := map[string]int{}
	kept := 0
	for _, q := range questions {
		if len(q.Missing) > 0 {
			d.dropped = append(d.dropped, q)
			continue
		}
		if opts.limit > 0 && kept == opts.limit {
			break
		}
		kept++
		key := strings.Join(append([]string{q.Text}, q.Options[:]...), "\x00")
		if i, ok := at[key]; ok {
			groups[i] = append(groups[i], q)
			d.duplicates++
			continue
		}
		at[key] = len(groups)
		groups = append(groups, []client.Question{q})
	}
	random := rand.New(rand.NewPCG(opts.seed, 0x6d6371))
	random.Shuffle(len(groups), func(i, j int) { groups[i], groups[j] = groups[j], groups[i] })
	wanted := int(math.Round(opts.valid * float64(kept)))
	var train, valid []client.Question
	for _, group := range groups {
		if len(valid) < wanted {
			valid = append(valid, group...)
		} else {
			train = append(train, group...)
		}
	}
	if len(train) == 0 {
		return nil, fmt.Errorf("%s: no rows are left to train on: of %d, %d with an empty cell, %d for validation", opts.in, d.total, len(d.dropped), len(valid))
	}
	trainPath, validPath := filepath.Join(opts.out, "train.jsonl"), filepath.Join(opts.out, "valid.jsonl")
	if base, isFile := strings.CutSuffix(opts.out, ".jsonl"); isFile {
		trainPath, validPath = opts.out, base+".valid.jsonl"
	}
	if err := os.MkdirAll(filepath.Dir(trainPath), 0o755); err != nil {
		return nil, err
	}
	if d.train, err = writeRows(trainPath, template, train); err != nil {
		return nil, err
	}
	if len(valid) > 0 {
		if d.valid, err = writeRows(validPath, template, valid); err != nil {
			return nil, err
		}
	}
	return d, writeRecipe(trainPath, template)
}

// writeRows writes one conversation a line: the question as the user's, the letter as the assistant's.
func writeRows(path, template string, questions []client.Question) (datasetFile, error) {
	file := datasetFile{path: path, rows: len(questions)}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	for _, q := range questions {
		row := struct {
			Messages []wire.Message `json:"messages"`
		}{[]wire.Message{{Role: "user", Content: client.Word(template, q)}, {Role: "assistant", Content: q.Answer}}}
		if err := encoder.Encode(row); err != nil {
			return file, err
		}
		file.letters[q.Answer[0]-'A']++
	}
	return file, writeFile(path, b.Bytes())
}

func writeRecipe(trainingFile, template string) error {
	data, err := os.ReadFile(trainingFile)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	out, err := json.MarshalIndent(recipe{SHA256: hex.EncodeToString(sum[:]), QuestionTemplate: template}, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(recipePath(trainingFile), append(out, '\n'))
}

// readRecipe returns the template that a training file of this content was worded with, "" if that is not known.
func readRecipe(trainingFile string, content []byte) (string, error) {
	data, err := os.ReadFile(recipePath(trainingFile))
	if os.IsNotExist(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var r recipe
	if err := json.Unmarshal(data, &r); err != nil {
		return "", fmt.Errorf("%s: %w; remove it if the training file was not made by hone dataset", recipePath(trainingFile), err)
	}
	if sum := sha256.Sum256(content); r.SHA256 != hex.EncodeToString(sum[:]) {
		return "", nil // the training file was changed since
	}
	return r.QuestionTemplate, nil
}

// writeFile replaces a file at once, so that a reader never sees half of it.
func writeFile(path string, data []byte) error {
	temp, err := os.CreateTemp(filepath.Dir(path), ".hone-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // after the rename there is none
	if err := temp.Chmod(0o644); err != nil {
		temp.Close()
		return err
	}
	if _, err := temp.Write(data); err != nil {
		temp.Close()
		return err
	}
	if err := temp.Close(); err != nil {
		return err
	}
	return os.Rename(temp.Name(), path)
}
