package finetune

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/store"
)

// message returns an event without data. Level is info, warn or error.
func message(level, format string, args ...any) store.Event {
	return store.Event{Level: level, Type: "message", Message: fmt.Sprintf(format, args...)}
}

// metrics is the data of a metrics event, with OpenAI's names. We evaluate on the whole validation file always, so the
// validation loss and the full validation loss are the same number.
type metrics struct {
	Step              int      `json:"step"`
	TotalSteps        int      `json:"total_steps"`
	TrainLoss         *float64 `json:"train_loss,omitempty"`
	TrainAccuracy     *float64 `json:"train_mean_token_accuracy,omitempty"`
	ValidLoss         *float64 `json:"valid_loss,omitempty"`
	ValidAccuracy     *float64 `json:"valid_mean_token_accuracy,omitempty"`
	FullValidLoss     *float64 `json:"full_valid_loss,omitempty"`
	FullValidAccuracy *float64 `json:"full_valid_mean_token_accuracy,omitempty"`
}

// event words the metrics as OpenAI does. The losses are in the text because go-openai drops the data of events.
func (m metrics) event() (store.Event, error) {
	data, err := json.Marshal(m)
	if err != nil {
		return store.Event{}, fmt.Errorf("metrics of step %d: %w", m.Step, err)
	}
	var parts []string
	part := func(name string, value *float64) {
		if value != nil {
			parts = append(parts, name+"="+strconv.FormatFloat(*value, 'f', 4, 64))
		}
	}
	part("training loss", m.TrainLoss)
	part("validation loss", m.ValidLoss)
	part("full validation loss", m.FullValidLoss)
	part("full validation accuracy", m.FullValidAccuracy)
	text := fmt.Sprintf("Step %d/%d: %s", m.Step, m.TotalSteps, strings.Join(parts, ", "))
	return store.Event{Level: "info", Type: "metrics", Message: text, Data: data}, nil
}

// datasetMessages says what the trainer found in the files.
func datasetMessages(e child.TrainerEvent) []store.Event {
	text := fmt.Sprintf("Training on %d examples with %d tokens", e.TrainRows, e.TrainTokens)
	if e.ValidRows > 0 {
		text += fmt.Sprintf(", validating on %d examples with %d tokens", e.ValidRows, e.ValidTokens)
	}
	events := []store.Event{message("info", "%s", text)}
	if e.DroppedRows > 0 {
		events = append(events, message("warn", "%d examples are longer than max_length and are left out", e.DroppedRows))
	}
	return events
}

// resultFile returns the CSV of a job's metrics events: a line a step, oldest first. A column without a value is empty.
func resultFile(events []store.Event) ([]byte, error) {
	steps := map[int]metrics{}
	var order []int
	for _, e := range events {
		var m metrics
		if err := json.Unmarshal(e.Data, &m); err != nil {
			return nil, fmt.Errorf("result file: event %s: %w", e.ID, err)
		}
		old, seen := steps[m.Step]
		if !seen {
			order = append(order, m.Step)
		}
		// The evaluation of a step comes as an event of its own.
		if m.ValidLoss == nil {
			m.ValidLoss, m.ValidAccuracy = old.ValidLoss, old.ValidAccuracy
		}
		steps[m.Step] = m
	}
	slices.Sort(order)
	var text strings.Builder
	w := csv.NewWriter(&text)
	number := func(v *float64) string {
		if v == nil {
			return ""
		}
		return strconv.FormatFloat(*v, 'g', 8, 64)
	}
	if err := w.Write([]string{"step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"}); err != nil {
		return nil, err
	}
	for _, step := range order {
		m := steps[step]
		err := w.Write([]string{strconv.Itoa(step), number(m.TrainLoss), number(m.TrainAccuracy), number(m.ValidLoss), number(m.ValidAccuracy)})
		if err != nil {
			return nil, err
		}
	}
	w.Flush()
	return []byte(text.String()), w.Error()
}
