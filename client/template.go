package client

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// DefaultTemplate words a question for the model, in training and in prediction alike. It is short because every token
// of it is read once a question.
const DefaultTemplate = "{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer with the letter only."

// Choices are the answers that a question has.
var Choices = []string{"A", "B", "C", "D"}

var placeholders = []string{"question", "a", "b", "c", "d"}

var placeholder = regexp.MustCompile(`\{[A-Za-z_]+\}`)

// CheckTemplate refuses a template that would lose a part of the question or holds a placeholder that there is not.
func CheckTemplate(template string) error {
	for _, name := range placeholders {
		if !strings.Contains(template, "{"+name+"}") {
			return fmt.Errorf("template: {%s} is missing; it needs {question}, {a}, {b}, {c} and {d}", name)
		}
	}
	for _, found := range placeholder.FindAllString(template, -1) {
		if !slices.Contains(placeholders, strings.Trim(found, "{}")) {
			return fmt.Errorf("template: %s is not a placeholder; there are {question}, {a}, {b}, {c} and {d}", found)
		}
	}
	return nil
}

// Word fills a question into a template. Braces in the question stay as they are.
func Word(template string, q Question) string {
	return strings.NewReplacer("{question}", q.Text, "{a}", q.Options[0], "{b}", q.Options[1], "{c}", q.Options[2],
		"{d}", q.Options[3]).Replace(template)
}
