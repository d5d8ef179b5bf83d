package main

import (
	"bytes"
	"encoding/csv"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func table(t *testing.T, data []byte) [][]string {
	t.Helper()
	rows, err := csv.NewReader(bytes.NewReader(data)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

func TestFilesInTheRepositoryAreTheGenerators(t *testing.T) {
	for name, want := range generate(defaultSeed) {
		got, err := os.ReadFile(filepath.Join("..", "..", "examples", "mcq", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("examples/mcq/%s differs from what the generator writes: run `go run ./scripts/mcq`", name)
		}
	}
}

func TestWordsBelongToOneCategory(t *testing.T) {
	for _, categories := range [][]category{english, chinese} {
		owner := map[string]string{}
		for _, c := range categories {
			for w := range strings.FieldsSeq(c.words) {
				if owner[w] != "" {
					t.Errorf("%q is in %q and in %q", w, owner[w], c.ask)
				}
				owner[w] = c.ask
			}
		}
		for _, c := range categories {
			for w := range strings.FieldsSeq(c.ask) {
				if owner[w] != "" {
					t.Errorf("%q is a word of %q and in the question of %q", w, owner[w], c.ask)
				}
			}
		}
	}
}

func TestTestWordsNeverOccurInTraining(t *testing.T) {
	files := generate(defaultSeed)
	seen := map[string]bool{}
	for _, row := range table(t, files["train.csv"])[1:] {
		for _, word := range row[1:5] {
			seen[word] = true
		}
	}
	for i, row := range table(t, files["test.csv"])[1:] {
		for _, word := range row[2:6] {
			if seen[word] {
				t.Errorf("test question %d uses %q, a training word", i+1, word)
			}
		}
	}
}

func TestAnswersAreRightAndEven(t *testing.T) {
	files := generate(defaultSeed)
	kind := map[string]string{} // word to the text that asks for it
	for _, c := range english {
		for w := range strings.FieldsSeq(c.words) {
			kind[w] = "Which of these is " + c.ask + "?"
		}
	}
	check := func(name, text string, options []string, answer string) {
		right := 0
		for i, o := range options {
			if kind[o] == text {
				right++
				if answer != letters[i:i+1] {
					t.Errorf("%s: %q %q: answer %q, want %c", name, text, options, answer, letters[i])
				}
			}
		}
		if right != 1 {
			t.Errorf("%s: %q %q has %d right options", name, text, options, right)
		}
	}
	counts := map[string]map[string]int{"train.csv": {}, "test.csv": {}, "zh.csv": {}}
	broken := 0
	for _, row := range table(t, files["train.csv"])[1:] {
		if strings.Contains(strings.Join(row, "\x00")+"\x00", "\x00\x00") || row[0] == "" {
			broken++
			continue
		}
		check("train.csv", row[0], row[1:5], row[5])
		counts["train.csv"][row[5]]++
	}
	if broken != len(brokenRows) {
		t.Errorf("train.csv has %d rows with a missing cell, want %d", broken, len(brokenRows))
	}
	answers := table(t, files["test_answers.csv"])[1:]
	for i, row := range table(t, files["test.csv"])[1:] {
		if answers[i][0] != row[0] {
			t.Fatalf("test_answers.csv row %d has ID %s, test.csv %s", i+1, answers[i][0], row[0])
		}
		check("test.csv", row[1], row[2:6], answers[i][1])
		counts["test.csv"][answers[i][1]]++
	}
	for _, row := range table(t, files["zh.csv"])[1:] {
		counts["zh.csv"][row[6]]++
	}
	for name, n := range counts {
		for _, l := range letters {
			if n[string(l)] != n["A"] || n["A"] == 0 {
				t.Errorf("%s: letter %c is the answer %d times, A %d times", name, l, n[string(l)], n["A"])
			}
		}
	}
}
