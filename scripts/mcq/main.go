// Command mcq writes the example questions of examples/mcq from its own word lists.
//
//	go run ./scripts/mcq -out examples/mcq
//
// The same seed writes the same bytes. Test questions are made only of words that occur nowhere in the training file,
// as answer or as option, so what a tuned model gains on them is not memory of the words. The right answer is at A, B, C
// and D equally often in each file.
package main

import (
	"bytes"
	"encoding/csv"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	defaultSeed    = 7
	trainQuestions = 608 // complete rows; see brokenRows
	testQuestions  = 240
	zhQuestions    = 40
	testShare      = 3 // one word in testShare is kept for the test questions
)

// letters name the answer positions.
const letters = "ABCD"

// question is one multiple-choice question; answer is the index of the right option.
type question struct {
	text    string
	options [4]string
	answer  int
}

func main() {
	out := flag.String("out", "examples/mcq", "directory to write to")
	seed := flag.Uint64("seed", defaultSeed, "seed of the random choices")
	flag.Parse()
	for name, data := range generate(*seed) {
		if err := os.WriteFile(filepath.Join(*out, name), data, 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "mcq:", err)
			os.Exit(1)
		}
	}
}

// generate returns the content of each file, by name.
func generate(seed uint64) map[string][]byte {
	random := rand.New(rand.NewPCG(seed, 0x6d6371)) // a fixed stream: only the seed varies
	trainWords, testWords := split(english, random)
	askEnglish := func(c category) string { return "Which of these is " + c.ask + "?" }
	train := compose(english, trainWords, trainQuestions, askEnglish, random)
	test := compose(english, testWords, testQuestions, askEnglish, random)

	zhWords := make([][]string, len(chinese))
	for i, c := range chinese {
		zhWords[i] = strings.Fields(c.words)
	}
	zh := compose(chinese, zhWords, zhQuestions, func(c category) string { return "下面哪一个是" + c.ask + "？" }, random)

	return map[string][]byte{
		"train.csv":        trainCSV(train, random),
		"test.csv":         testCSV(test),
		"test_answers.csv": answersCSV(test),
		"zh.csv":           zhCSV(zh),
	}
}

// split shuffles each category's words and keeps one in testShare of them for the test questions.
func split(categories []category, random *rand.Rand) (train, test [][]string) {
	for _, c := range categories {
		words := strings.Fields(c.words)
		random.Shuffle(len(words), func(i, j int) { words[i], words[j] = words[j], words[i] })
		n := len(words) / testShare
		test = append(test, words[:n])
		train = append(train, words[n:])
	}
	return train, test
}

// compose makes n different questions in random order. Categories take turns, and so do the words of a category as right
// answers; the wrong options come from three other categories.
func compose(categories []category, words [][]string, n int, ask func(category) string, random *rand.Rand) []question {
	questions := make([]question, 0, n)
	seen := map[question]bool{}
	for i := 0; len(questions) < n; i++ {
		kind := i % len(categories)
		members := words[kind]
		q := question{text: ask(categories[kind]), answer: len(questions) % 4}
		q.options[q.answer] = members[(i/len(categories))%len(members)]
		others := random.Perm(len(categories))
		next := 0
		for slot := range q.options {
			if slot == q.answer {
				continue
			}
			if others[next] == kind {
				next++
			}
			from := words[others[next]]
			q.options[slot] = from[random.IntN(len(from))]
			next++
		}
		if !seen[q] {
			seen[q] = true
			questions = append(questions, q)
		}
	}
	random.Shuffle(n, func(i, j int) { questions[i], questions[j] = questions[j], questions[i] })
	return questions
}

// brokenRows are added to the training file with one cell missing, as in files that people keep by hand:
// `hone dataset mcq` must drop them and say so. The index is the missing column.
var brokenRows = []int{5, 2, 4, 0, 5, 3}

func trainCSV(questions []question, random *rand.Rand) []byte {
	rows := make([][]string, 0, len(questions)+len(brokenRows))
	for _, q := range questions {
		rows = append(rows, q.cells(true))
	}
	for i, column := range brokenRows {
		row := append([]string(nil), rows[random.IntN(len(questions))]...)
		row[column] = ""
		at := (i + 1) * len(rows) / (len(brokenRows) + 1)
		rows = append(rows[:at], append([][]string{row}, rows[at:]...)...)
	}
	return encode("Question,Option A,Option B,Option C,Option D,Answer", rows)
}

// testCSV has a space before Question in its header, as the files of the first user have: readers must trim.
func testCSV(questions []question) []byte {
	var rows [][]string
	for i, q := range questions {
		rows = append(rows, append([]string{strconv.Itoa(i + 1)}, q.cells(false)...))
	}
	return encode("ID, Question,Option A,Option B,Option C,Option D", rows)
}

func answersCSV(questions []question) []byte {
	var rows [][]string
	for i, q := range questions {
		rows = append(rows, []string{strconv.Itoa(i + 1), letters[q.answer : q.answer+1]})
	}
	return encode("ID,Answer", rows)
}

// zhCSV has full-width marks and, in every tenth question, a comma and a line break inside a cell.
func zhCSV(questions []question) []byte {
	var rows [][]string
	for i, q := range questions {
		if i%10 == 9 {
			q.text = "看看下面的词,\n" + q.text
		}
		rows = append(rows, append([]string{strconv.Itoa(i + 1)}, q.cells(true)...))
	}
	return encode("ID, Question,Option A,Option B,Option C,Option D,Answer", rows)
}

func (q question) cells(withAnswer bool) []string {
	cells := append([]string{q.text}, q.options[:]...)
	if withAnswer {
		cells = append(cells, letters[q.answer:q.answer+1])
	}
	return cells
}

// encode writes the header as given, since a csv.Writer would put quotes around a leading space.
func encode(header string, rows [][]string) []byte {
	var buf bytes.Buffer
	buf.WriteString(header + "\n")
	_ = csv.NewWriter(&buf).WriteAll(rows) // a bytes.Buffer takes every write
	return buf.Bytes()
}
