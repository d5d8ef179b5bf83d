package finetune

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/dustin/go-humanize/english"

	"github.com/hone-llm/hone/internal/store"
	"github.com/hone-llm/hone/internal/wire"
)

// reportName is the name of the result file that a Report becomes.
const reportName = "validation_report.json"

// Report is what validation found in the files of a job: a result file of the job, and the data of its event. Tokens are not in
// it: the trainer counts them.
type Report struct {
	Valid      bool        `json:"valid"`
	Training   FileReport  `json:"training_file"`
	Validation *FileReport `json:"validation_file"` // nil if there is none, or if the training file could not be read
	// Overlap are the rows of the validation file that are in the training file too, but for white space.
	Overlap *Repeated `json:"overlap"` // nil without a validation file
}

// FileReport is what validation found in one file.
type FileReport struct {
	ID       string        `json:"id"`
	Rows     int           `json:"rows"`      // that can be used
	BadLines int           `json:"bad_lines"` // that cannot
	Errors   []LineProblem `json:"errors"`    // of the first of them, at most 20
	Problem  string        `json:"problem"`   // of the file as a whole, or ""

	Messages          map[string]int `json:"messages"`           // by role; empty for rows of plain text
	UntrainedAnswers  int            `json:"untrained_answers"`  // assistant messages of weight 0
	Characters        int64          `json:"characters"`         // of all rows, as lines of JSON
	LongestCharacters int            `json:"longest_characters"` // of a row
	LongestLine       int            `json:"longest_line"`
	Duplicates        Repeated       `json:"duplicates"` // rows that were there before, but for white space
	// Answers are how often each last answer is there, of files with so few different ones that they look like the choices of
	// one kind of question; else nil.
	Answers map[string]int `json:"answers"`

	hashes  []rowHash
	answers map[string]int // nil once there are too many
}

// LineProblem is a line that cannot be used.
type LineProblem struct {
	Line    int    `json:"line"`
	Message string `json:"message"`
}

// Repeated are rows that are equal to others.
type Repeated struct {
	Rows  int        `json:"rows"`
	First []SameLine `json:"first"` // at most 20
	// Compared is how many rows of a file were compared, if not all.
	Compared int `json:"compared,omitempty"`
}

// SameLine is a line whose row is that of another line too: of the same file, or of the training file.
type SameLine struct {
	Line int `json:"line"`
	Same int `json:"same_as"`
}

const (
	maxAnswers  = 16      // different answers of one kind of question, as the trainer takes them
	maxAnswer   = 200     // bytes of one
	maxCompared = 4 << 20 // rows of a file that are compared: 16 bytes each
)

// rowHash is a row without its white space.
type rowHash struct {
	hash uint64
	line int32
}

// add counts a row that can be used.
func (r *FileReport) add(number int, line []byte, row *trainingRow, kind wire.RowKind) {
	r.Rows++
	characters := utf8.RuneCount(line)
	r.Characters += int64(characters)
	if characters > r.LongestCharacters {
		r.LongestCharacters, r.LongestLine = characters, number
	}
	if len(r.hashes) < maxCompared {
		r.hashes = append(r.hashes, rowHash{row.hash(), int32(number)})
	}
	answer, answered := row.last(r, kind)
	switch {
	case r.Rows == 1 && answered:
		r.answers = map[string]int{answer: 1}
	case r.answers == nil:
	case !answered || len(answer) > maxAnswer:
		r.answers = nil
	default:
		if r.answers[answer]++; len(r.answers) > maxAnswers {
			r.answers = nil
		}
	}
}

// last counts the messages of a row by role, and returns its last answer, if its kind has one.
func (r *trainingRow) last(report *FileReport, kind wire.RowKind) (answer string, answered bool) {
	var messages []json.RawMessage
	list := func(raw json.RawMessage) {
		var more []json.RawMessage
		if json.Unmarshal(raw, &more) == nil {
			messages = append(messages, more...)
		}
	}
	switch kind {
	case wire.ChatRows:
		messages = *r.Messages
	case wire.ChatCompletionRows:
		list(r.Prompt)
		list(r.Completion)
	case wire.CompletionRows:
		answered = json.Unmarshal(r.Completion, &answer) == nil
	case wire.OutputPairs:
		messages = *r.Input.Messages
		list(r.Preferred)
		list(r.NonPreferred)
	case wire.ChatPairs:
		list(r.Prompt)
		list(r.Chosen)
		list(r.Rejected)
	case wire.TextRows, wire.TextPairs:
	}
	for _, raw := range messages {
		var m wire.Message
		if json.Unmarshal(raw, &m) != nil {
			continue // it was checked
		}
		report.Messages[m.Role]++
		if m.Weight != nil && *m.Weight == 0 {
			report.UntrainedAnswers++
		}
		answer, answered = m.Content, len(m.ToolCalls) == 0 && !kind.Pairs()
	}
	return strings.TrimSpace(answer), answered
}

// hash is the same for rows that differ in white space, in the order of keys, or in keys that are the author's own.
func (r *trainingRow) hash() uint64 {
	h := fnv.New64a()
	field := func(name string, raw json.RawMessage) {
		if present(raw) {
			_, _ = h.Write([]byte(name)) // a hash takes everything
			hashJSON(h, raw)
		}
	}
	talk := func(name string, c *conversation) {
		if c.Messages != nil {
			for _, m := range *c.Messages {
				field(name, m)
			}
		}
		for _, t := range c.Tools {
			field("tools", t)
		}
	}
	talk("messages", &r.conversation)
	field("prompt", r.Prompt)
	field("completion", r.Completion)
	field("text", r.Text)
	field("chosen", r.Chosen)
	field("rejected", r.Rejected)
	if r.Input != nil {
		talk("input", r.Input)
	}
	field("preferred_output", r.Preferred)
	field("non_preferred_output", r.NonPreferred)
	return h.Sum64()
}

func hashJSON(h hash.Hash64, raw json.RawMessage) {
	var v any
	if json.Unmarshal(raw, &v) == nil {
		hashValue(h, v)
	}
}

// hashValue writes a value so that two write the same only if they are the same but for white space in their strings.
func hashValue(h hash.Hash64, v any) {
	mark := func(text string) { _, _ = h.Write([]byte(text)) }
	switch v := v.(type) {
	case string:
		mark(strconv.Quote(strings.Join(strings.Fields(v), " ")))
	case map[string]any:
		mark("{")
		for _, key := range slices.Sorted(maps.Keys(v)) {
			if v[key] != nil {
				mark(strconv.Quote(key))
				hashValue(h, v[key])
			}
		}
		mark("}")
	case []any:
		mark("[")
		for _, element := range v {
			hashValue(h, element)
			mark(",")
		}
		mark("]")
	default:
		mark(fmt.Sprint(v))
	}
}

// finish is called once, after the last row.
func (r *FileReport) finish() {
	if n := len(r.answers); n > 1 && n <= r.Rows/2 {
		r.Answers = r.answers
	}
	slices.SortFunc(r.hashes, func(a, b rowHash) int { return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.line, b.line)) })
	for i, first := 1, 0; i < len(r.hashes); i++ {
		if r.hashes[i].hash != r.hashes[first].hash {
			first = i
			continue
		}
		r.Duplicates.add(r.hashes[i], r.hashes[first])
	}
	r.Duplicates.finish()
	if r.Rows > len(r.hashes) {
		r.Duplicates.Compared = len(r.hashes)
	}
}

func (r *Repeated) add(row, same rowHash) {
	r.Rows++
	r.First = append(r.First, SameLine{int(row.line), int(same.line)})
	if len(r.First) >= 4096 { // they come in the order of hashes
		r.finish()
	}
}

// finish leaves the first lines.
func (r *Repeated) finish() {
	slices.SortFunc(r.First, func(a, b SameLine) int { return a.Line - b.Line })
	r.First = append([]SameLine{}, r.First[:min(len(r.First), maxLineErrors)]...)
}

// overlap returns the rows of valid that are in training too. Both are finished.
func overlap(training, valid *FileReport) *Repeated {
	both := &Repeated{}
	at := 0
	for _, row := range valid.hashes {
		for at < len(training.hashes) && training.hashes[at].hash < row.hash {
			at++
		}
		if at < len(training.hashes) && training.hashes[at].hash == row.hash {
			both.add(row, training.hashes[at])
		}
	}
	both.finish()
	if n := len(training.hashes); training.Rows > n {
		both.Compared = n
	}
	return both
}

// result is the report as a file.
func (r *Report) result() (store.Result, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return store.Result{}, fmt.Errorf("validation report: %w", err)
	}
	return store.Result{Filename: reportName, Purpose: "fine-tune-results", Content: append(data, '\n')}, nil
}

// events say what a report of good files has: a summary, and what the author may not know.
func (r *Report) events() ([]store.Event, error) {
	text := "Training file: " + r.Training.describe()
	if r.Validation != nil {
		text += "; validation file: " + r.Validation.describe()
	}
	summary := message("info", "%s", text)
	var err error
	if summary.Data, err = json.Marshal(r); err != nil {
		return nil, fmt.Errorf("validation report: %w", err)
	}
	events := []store.Event{summary}
	for _, file := range []struct {
		name string
		*FileReport
	}{{"training", &r.Training}, {"validation", r.Validation}} {
		if file.FileReport != nil && file.Duplicates.Rows > 0 {
			first := file.Duplicates.First[0]
			events = append(events, message("warn", "The %s file has %s; the first is line %d, the same as line %d",
				file.name, english.Plural(file.Duplicates.Rows, "duplicate row", ""), first.Line, first.Same))
		}
	}
	if r.Overlap != nil && r.Overlap.Rows > 0 {
		first := r.Overlap.First[0]
		events = append(events, message("warn", "The validation file has %s that the training file has too, the first in line %d (line %d there): "+
			"what is measured on them says little about new rows", english.Plural(r.Overlap.Rows, "row", ""), first.Line, first.Same))
	}
	if r.Validation != nil && r.Training.Answers != nil {
		for _, answer := range slices.Sorted(maps.Keys(r.Validation.Answers)) {
			if r.Training.Answers[answer] == 0 {
				events = append(events, message("warn", "The answer %.40q is in the validation file and never in the training file", answer))
			}
		}
	}
	return events, nil
}

// describe says what is in a file: 250 rows, 500 messages (250 assistant, 250 user), answers A 60, B 65, C 60, D 65.
func (r *FileReport) describe() string {
	text := english.Plural(r.Rows, "row", "")
	if len(r.Messages) > 0 {
		total := 0
		for _, n := range r.Messages {
			total += n
		}
		text += fmt.Sprintf(", %s (%s)", english.Plural(total, "message", ""), counts(r.Messages))
	}
	if r.UntrainedAnswers > 0 {
		text += fmt.Sprintf(", %d of weight 0", r.UntrainedAnswers)
	}
	if r.Answers != nil {
		text += ", answers " + strings.ReplaceAll(counts(r.Answers), "\n", " ")
	}
	return text
}

// counts lists what there is how often: the word before the number for answers and roles alike.
func counts(of map[string]int) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(of)) {
		shown := name
		if utf8.RuneCountInString(shown) > 40 {
			shown = string([]rune(shown)[:40]) + "..."
		}
		parts = append(parts, fmt.Sprintf("%s %d", shown, of[name]))
	}
	return strings.Join(parts, ", ")
}

// checkChoice refuses a row whose last answer is none of the choices.
func checkChoice(row *trainingRow, kind wire.RowKind, choices []string) error {
	if len(choices) == 0 || kind == "" || kind.Pairs() {
		return nil
	}
	answer, answered := row.last(&FileReport{Messages: map[string]int{}}, kind)
	switch {
	case !answered:
		return errors.New("no answer that could be one of the choices; expected an assistant message or a completion")
	case !slices.Contains(choices, answer):
		return fmt.Errorf("the last answer is %.60q; expected one of the choices: %s", answer, strings.Join(choices, ", "))
	}
	return nil
}
