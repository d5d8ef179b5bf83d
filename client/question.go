package client

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/encoding/htmlindex"
	"golang.org/x/text/width"
)

// Question is one row of a question file.
type Question struct {
	ID      string // the ID column, or the row number
	Row     int    // counted from 1, without the header
	Line    int    // line of the file that the row begins on
	Text    string
	Options [4]string
	Answer  string   // A, B, C or D; "" if the file has none
	Missing []string // names of the columns that are empty in this row; only with ReadOptions.AllowMissing
}

// ReadOptions says how a question file is read.
type ReadOptions struct {
	// Encoding is a name as in HTML: utf-8, gbk, gb18030, big5, shift_jis... "" takes UTF-8, or UTF-16 with a byte order
	// mark, and refuses anything else: an encoding is never guessed.
	Encoding string
	// NeedAnswer makes a row without an answer an error.
	NeedAnswer bool
	// AllowMissing returns rows with empty cells, their Missing set, instead of an error.
	AllowMissing bool
}

// FileError says where in a question file something is wrong.
type FileError struct {
	File   string
	Row    int // 0 for the header
	Line   int
	Column string // "" if no single column is to blame
	Reason string
}

func (e *FileError) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		b.WriteString(":" + strconv.Itoa(e.Line))
	}
	if e.Row > 0 {
		b.WriteString(": row " + strconv.Itoa(e.Row))
	}
	if e.Column != "" {
		fmt.Fprintf(&b, ": column %q", e.Column)
	}
	return b.String() + ": " + e.Reason
}

// column is a column that a question file may have, with the headers it goes by (as normalised by headerKey).
type column struct {
	name     string
	keys     []string
	required bool
}

const (
	columnID = iota
	columnQuestion
	columnA
	columnAnswer = columnA + 4
)

var columns = []column{
	{"ID", []string{"id", "编号", "题号"}, false},
	{"Question", []string{"question", "题目", "问题"}, true},
	{"Option A", []string{"optiona", "a", "选项a"}, true},
	{"Option B", []string{"optionb", "b", "选项b"}, true},
	{"Option C", []string{"optionc", "c", "选项c"}, true},
	{"Option D", []string{"optiond", "d", "选项d"}, true},
	{"Answer", []string{"answer", "答案"}, false},
}

// ReadQuestions reads a CSV file of questions. Its header names the columns Question, Option A to Option D and, where
// there are, ID and Answer, in any order and case, with or without spaces; other columns are ignored. Fields may be
// quoted and hold line breaks; lines end in LF or CRLF; commas, semicolons and tabs separate. Errors are *FileError.
func ReadQuestions(path string, opts ReadOptions) ([]Question, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ParseQuestions(path, data, opts)
}

// ParseQuestions is ReadQuestions of data that is in memory; name is for the errors.
func ParseQuestions(name string, data []byte, opts ReadOptions) ([]Question, error) {
	table, err := readTable(name, data, opts.Encoding)
	if err != nil {
		return nil, err
	}
	for i, c := range columns {
		if table.at[i] < 0 && (c.required || i == columnAnswer && opts.NeedAnswer) {
			return nil, &FileError{File: name, Line: 1, Column: c.name, Reason: "there is no such column; the header has " + quoteAll(table.header)}
		}
	}
	var questions []Question
	ids := map[string]int{}
	for i, record := range table.rows {
		q := Question{Row: i + 1, Line: record.line}
		fail := func(column, format string, args ...any) error {
			return &FileError{File: name, Row: q.Row, Line: q.Line, Column: column, Reason: fmt.Sprintf(format, args...)}
		}
		cell := func(i int) string { return strings.TrimSpace(record.cells[table.at[i]]) }
		for i, c := range columns {
			if table.at[i] >= len(record.cells) {
				return nil, fail(c.name, "the row ends before it: %d cells, the header has %d", len(record.cells), len(table.header))
			}
			if table.at[i] < 0 || cell(i) != "" || i == columnAnswer && !opts.NeedAnswer {
				continue
			}
			if !opts.AllowMissing {
				return nil, fail(c.name, "the cell is empty")
			}
			q.Missing = append(q.Missing, c.name)
		}
		q.Text = cell(columnQuestion)
		for o := range q.Options {
			q.Options[o] = cell(columnA + o)
		}
		if table.at[columnAnswer] >= 0 && cell(columnAnswer) != "" {
			if q.Answer, err = parseAnswer(cell(columnAnswer)); err != nil {
				return nil, fail("Answer", "%v", err)
			}
		}
		q.ID = strconv.Itoa(q.Row)
		if table.at[columnID] >= 0 {
			q.ID = cell(columnID)
			if first, ok := ids[q.ID]; ok && q.ID != "" {
				return nil, fail("ID", "%q is also the ID of row %d", q.ID, first)
			}
			ids[q.ID] = q.Row
		}
		questions = append(questions, q)
	}
	if len(questions) == 0 {
		return nil, &FileError{File: name, Reason: "there are no questions in it"}
	}
	return questions, nil
}

// ReadAnswers reads a CSV file with the columns ID and Answer: the right answer, A to D, by ID.
func ReadAnswers(path, encoding string) (map[string]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	table, err := readTable(path, data, encoding)
	if err != nil {
		return nil, err
	}
	for _, i := range []int{columnID, columnAnswer} {
		if table.at[i] < 0 {
			return nil, &FileError{File: path, Line: 1, Column: columns[i].name, Reason: "there is no such column; the header has " + quoteAll(table.header)}
		}
	}
	answers := map[string]string{}
	for i, record := range table.rows {
		if len(record.cells) <= max(table.at[columnID], table.at[columnAnswer]) {
			return nil, &FileError{File: path, Row: i + 1, Line: record.line, Reason: fmt.Sprintf("%d cells, the header has %d", len(record.cells), len(table.header))}
		}
		answer, err := parseAnswer(record.cells[table.at[columnAnswer]])
		if err != nil {
			return nil, &FileError{File: path, Row: i + 1, Line: record.line, Column: "Answer", Reason: err.Error()}
		}
		answers[strings.TrimSpace(record.cells[table.at[columnID]])] = answer
	}
	return answers, nil
}

// parseAnswer accepts a letter in either case and width, with a mark around it: "b", "Ｂ", "B.", "(B)".
func parseAnswer(cell string) (string, error) {
	folded := strings.ToUpper(width.Fold.String(cell))
	letter := strings.TrimFunc(folded, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsPunct(r) })
	if !slices.Contains(Choices, letter) {
		return "", fmt.Errorf("expected A, B, C or D, not %q", cell)
	}
	return letter, nil
}

// table is a CSV file: at[i] is the position of columns[i], or -1.
type table struct {
	header []string
	at     [columnAnswer + 1]int
	rows   []record
}

type record struct {
	line  int
	cells []string
}

func readTable(name string, data []byte, encoding string) (*table, error) {
	text, err := decode(data, encoding)
	if err != nil {
		return nil, &FileError{File: name, Reason: err.Error()}
	}
	if !strings.Contains(text, "\n") {
		text = strings.ReplaceAll(text, "\r", "\n") // line ends of old spreadsheets
	}
	reader := csv.NewReader(strings.NewReader(text))
	reader.Comma = separator(text)
	reader.FieldsPerRecord = -1    // checked against the header below, with a better message
	reader.TrimLeadingSpace = true // a, "b": else the quote is an error
	t := &table{}
	for {
		cells, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if parse, ok := errors.AsType[*csv.ParseError](err); ok {
				return nil, &FileError{File: name, Row: len(t.rows) + min(len(t.header), 1), Line: parse.Line,
					Reason: fmt.Sprintf("%v at byte %d of the line; the row begins on line %d", parse.Err, parse.Column, parse.StartLine)}
			}
			return nil, err
		}
		line, _ := reader.FieldPos(0)
		if t.header == nil {
			if err := t.setHeader(name, cells); err != nil {
				return nil, err
			}
			continue
		}
		if strings.TrimSpace(strings.Join(cells, "")) == "" {
			continue // spreadsheets leave such rows at the end
		}
		if len(cells) > len(t.header) {
			return nil, &FileError{File: name, Row: len(t.rows) + 1, Line: line,
				Reason: fmt.Sprintf("%d cells, the header has %d: is a comma in a cell without quotes around it?", len(cells), len(t.header))}
		}
		t.rows = append(t.rows, record{line, cells})
	}
	if t.header == nil {
		return nil, &FileError{File: name, Reason: "the file is empty"}
	}
	return t, nil
}

func (t *table) setHeader(name string, cells []string) error {
	t.header = cells
	for i := range t.at {
		t.at[i] = -1
	}
	for at, cell := range cells {
		key := headerKey(cell)
		i := slices.IndexFunc(columns, func(c column) bool { return slices.Contains(c.keys, key) })
		if i < 0 {
			continue
		}
		if t.at[i] >= 0 {
			return &FileError{File: name, Line: 1, Column: columns[i].name, Reason: fmt.Sprintf("the header has it twice: %q and %q", cells[t.at[i]], cell)}
		}
		t.at[i] = at
	}
	return nil
}

// headerKey makes headers comparable: half-width, lower case, letters and digits only.
func headerKey(header string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) {
			return unicode.ToLower(r)
		}
		return -1
	}, width.Fold.String(header))
}

// separator is the mark that the header's line has most of.
func separator(text string) rune {
	line, _, _ := strings.Cut(text, "\n")
	best := ','
	for _, mark := range ";\t" {
		if strings.Count(line, string(mark)) > strings.Count(line, string(best)) {
			best = mark
		}
	}
	return best
}

// decode returns the text of data as UTF-8 without a byte order mark.
func decode(data []byte, encoding string) (string, error) {
	utf8Mark := []byte("\uFEFF")
	if encoding == "" {
		switch {
		case bytes.HasPrefix(data, utf8Mark):
			encoding = "utf-8"
		case bytes.HasPrefix(data, []byte{0xFF, 0xFE}):
			encoding = "utf-16le"
		case bytes.HasPrefix(data, []byte{0xFE, 0xFF}):
			encoding = "utf-16be"
		default:
			encoding = "utf-8"
		}
	}
	enc, err := htmlindex.Get(encoding)
	if err != nil {
		return "", fmt.Errorf("unknown encoding %q; use utf-8, gb18030, gbk, big5, shift_jis, euc-kr, utf-16le...", encoding)
	}
	if name, err := htmlindex.Name(enc); err == nil && name == "utf-8" {
		data = bytes.TrimPrefix(data, utf8Mark)
		if utf8.Valid(data) {
			return string(data), nil
		}
		line, at := 1, 0
		for at < len(data) {
			r, size := utf8.DecodeRune(data[at:])
			if r == utf8.RuneError && size == 1 {
				break
			}
			if r == '\n' {
				line++
			}
			at += size
		}
		return "", fmt.Errorf("line %d is not UTF-8 (byte %d is %#x): name the encoding; for Chinese text of a spreadsheet program it is gb18030", line, at, data[at])
	}
	text, err := enc.NewDecoder().Bytes(data)
	if err != nil {
		return "", fmt.Errorf("decode as %s: %w", encoding, err)
	}
	if i := bytes.IndexRune(text, utf8.RuneError); i >= 0 {
		return "", fmt.Errorf("line %d is not %s: name another encoding", 1+bytes.Count(text[:i], []byte("\n")), encoding)
	}
	return strings.TrimPrefix(string(text), "\uFEFF"), nil
}

func quoteAll(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = strconv.Quote(n)
	}
	return strings.Join(quoted, ", ")
}
