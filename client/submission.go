package client

import (
	"bytes"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// Submission is a file of answers that is written row by row, in the questions' order, and that an interrupted run can
// continue. What it was made from is in a file beside it, its name and ".hone.json".
type Submission struct {
	file    *os.File
	path    string
	origin  Origin
	done    []Prediction // the rows that were there: ID, Answer and, with details, the probabilities
	written int
}

// Origin is what a submission was made from. A run continues only a file of the same origin.
type Origin struct {
	Model           string `json:"model"`
	ModelDigest     string `json:"model_digest,omitempty"` // of the base model's file
	QuestionsSHA256 string `json:"questions_sha256"`
	TemplateSHA256  string `json:"template_sha256"`
	Questions       int    `json:"questions"`
	Details         bool   `json:"details"`
}

// NewOrigin describes a run of p over a question file of this content.
func NewOrigin(p *Predictor, questionFile []byte, questions int, details bool) Origin {
	o := Origin{Model: p.options.Model, QuestionsSHA256: digest(questionFile), TemplateSHA256: digest([]byte(p.options.Template)),
		Questions: questions, Details: details}
	if p.model.Hone != nil {
		o.ModelDigest = p.model.Hone.Digest
	}
	return o
}

// Errors of OpenSubmission. Each is wrapped with what to do.
var (
	ErrComplete = errors.New("the file is complete")
	ErrMismatch = errors.New("the file was made from something else")
	ErrForeign  = errors.New("the file was not written by hone predict, or was changed since")
)

// OpenSubmission creates the file at path, or opens it to go on where a run of the same origin was interrupted. With
// overwrite, what is there is replaced.
func OpenSubmission(path string, origin Origin, questions []Question, overwrite bool) (*Submission, error) {
	s := &Submission{path: path, origin: origin}
	old, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && overwrite:
		return s, s.create()
	case err != nil:
		return nil, err
	}
	data, err := os.ReadFile(sidecar(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: --overwrite replaces it", path, ErrForeign)
	}
	if err != nil {
		return nil, err
	}
	var before Origin
	if err := json.Unmarshal(data, &before); err != nil {
		return nil, fmt.Errorf("%s: %w: --overwrite replaces it", sidecar(path), err)
	}
	if before != origin {
		return nil, fmt.Errorf("%s: %w (%s): --overwrite replaces it", path, ErrMismatch, difference(before, origin))
	}
	keep, err := s.readDone(old, questions)
	if err != nil {
		return nil, err
	}
	unanswered := 0
	for _, p := range s.done {
		if p.Err != nil {
			unanswered++
		}
	}
	switch complete := len(s.done) == len(questions); {
	case complete && unanswered > 0:
		return nil, fmt.Errorf("%s: %w, with %d of %d questions unanswered: --overwrite asks all of them again", path, ErrComplete, unanswered, len(questions))
	case complete:
		return nil, fmt.Errorf("%s: %w: --overwrite replaces it", path, ErrComplete)
	}
	if keep == 0 {
		return s, s.create()
	}
	if s.file, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	// What follows the last whole row is a row that the interrupted run was writing.
	err = s.file.Truncate(keep)
	if err == nil {
		_, err = s.file.Seek(keep, io.SeekStart)
	}
	if err != nil {
		s.file.Close()
		return nil, err
	}
	s.written = len(s.done)
	return s, nil
}

// Done returns the rows that an earlier run wrote; Run needs the questions after them.
func (s *Submission) Done() []Prediction { return s.done }

// Write appends a row. It is in the file, not in a buffer, when Write returns. A prediction with Err leaves its answer
// empty.
func (s *Submission) Write(p Prediction) error {
	row := []string{p.Question.ID, p.Answer}
	if s.origin.Details {
		for _, v := range append(p.Probabilities[:], p.Confidence) {
			cell := ""
			if p.Err == nil {
				cell = strconv.FormatFloat(v, 'f', 6, 64)
			}
			row = append(row, cell)
		}
	}
	if _, err := s.file.Write(csvLine(row)); err != nil {
		return fmt.Errorf("write row %d: %w", s.written+1, err)
	}
	s.written++
	return nil
}

// Close makes what was written survive a power failure.
func (s *Submission) Close() error {
	return errors.Join(s.file.Sync(), s.file.Close())
}

// create writes the origin before the file that it describes, so a file never stands beside another's origin.
func (s *Submission) create() error {
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	data, err := json.MarshalIndent(s.origin, "", "  ")
	if err != nil {
		return err
	}
	temp := sidecar(s.path) + ".tmp"
	if err := os.WriteFile(temp, append(data, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.Rename(temp, sidecar(s.path)); err != nil {
		return err
	}
	if s.file, err = os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
		return err
	}
	_, err = s.file.Write(csvLine(s.header()))
	return err
}

func (s *Submission) header() []string {
	header := []string{"ID", "Answer"}
	if s.origin.Details {
		for _, c := range Choices {
			header = append(header, "P("+c+")")
		}
		header = append(header, "Confidence")
	}
	return header
}

// readDone takes over the whole rows of an interrupted run, and returns how many bytes they and the header are.
func (s *Submission) readDone(old []byte, questions []Question) (int64, error) {
	foreign := func(line int, format string, args ...any) error {
		return fmt.Errorf("%s:%d: %w (%s): --overwrite replaces it", s.path, line, ErrForeign, fmt.Sprintf(format, args...))
	}
	header := csvLine(s.header())
	if !bytes.HasPrefix(old, header) {
		if bytes.HasPrefix(header, old) {
			return 0, nil // interrupted in the header
		}
		return 0, foreign(1, "expected the header %q", bytes.TrimSpace(header))
	}
	reader := csv.NewReader(bytes.NewReader(old))
	reader.FieldsPerRecord = -1
	if _, err := reader.Read(); err != nil {
		return 0, foreign(1, "%v", err)
	}
	keep := reader.InputOffset()
	for {
		row, err := reader.Read()
		end := reader.InputOffset()
		if err != nil || end > int64(len(old)) || old[end-1] != '\n' {
			if err == nil || errors.Is(err, io.EOF) || bytes.IndexByte(old[keep:], '\n') < 0 {
				return keep, nil // the end, or the row that was being written
			}
			return 0, foreign(len(s.done)+2, "%v", err)
		}
		n := len(s.done)
		if n == len(questions) || len(row) != len(s.header()) || row[0] != questions[n].ID {
			return 0, foreign(n+2, "expected the row of question %d", n+1)
		}
		p := Prediction{Question: questions[n], Answer: row[1]}
		switch {
		case p.Answer == "":
			p.Err = errors.New("no answer in an earlier run; --overwrite asks again")
		case s.origin.Details:
			for i := range p.Probabilities {
				if p.Probabilities[i], err = strconv.ParseFloat(row[2+i], 64); err != nil {
					return 0, foreign(n+2, "%v", err)
				}
			}
			if p.Confidence, err = strconv.ParseFloat(row[6], 64); err != nil {
				return 0, foreign(n+2, "%v", err)
			}
		}
		s.done = append(s.done, p)
		keep = end
	}
}

func difference(before, now Origin) string {
	switch {
	case before.Model != now.Model:
		return fmt.Sprintf("model %s, now %s", before.Model, now.Model)
	case before.ModelDigest != now.ModelDigest:
		return "another file of the model " + now.Model
	case before.QuestionsSHA256 != now.QuestionsSHA256 || before.Questions != now.Questions:
		return "other questions"
	case before.TemplateSHA256 != now.TemplateSHA256:
		return "another template"
	default:
		return "with and without details"
	}
}

func sidecar(path string) string { return filepath.Clean(path) + ".hone.json" }

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func csvLine(cells []string) []byte {
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	_ = w.Write(cells) // a bytes.Buffer takes every write
	w.Flush()
	return b.Bytes()
}
