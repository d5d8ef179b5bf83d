package finetune

import (
	"cmp"
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

	// These are ours. Rewards are DPO's, as TRL logs them.
	TrainChoiceAccuracy *float64 `json:"train_choice_accuracy,omitempty"`
	ValidChoiceAccuracy *float64 `json:"valid_choice_accuracy,omitempty"`
	RewardsChosen       *float64 `json:"rewards_chosen,omitempty"`
	RewardsRejected     *float64 `json:"rewards_rejected,omitempty"`
	LearningRate        float64  `json:"learning_rate,omitempty"`
	GradNorm            float64  `json:"grad_norm,omitempty"`
	Best                bool     `json:"best,omitempty"` // the best evaluation so far
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
	part("validation choice accuracy", m.ValidChoiceAccuracy)
	text := fmt.Sprintf("Step %d/%d: %s", m.Step, m.TotalSteps, strings.Join(parts, ", "))
	return store.Event{Level: "info", Type: "metrics", Message: text, Data: data}, nil
}

// join takes over what an event of the same step says and m does not.
func (m metrics) join(old metrics) metrics {
	first := func(a **float64, b *float64) {
		if *a == nil {
			*a = b
		}
	}
	first(&m.TrainLoss, old.TrainLoss)
	first(&m.TrainAccuracy, old.TrainAccuracy)
	first(&m.TrainChoiceAccuracy, old.TrainChoiceAccuracy)
	first(&m.RewardsChosen, old.RewardsChosen)
	first(&m.RewardsRejected, old.RewardsRejected)
	first(&m.ValidLoss, old.ValidLoss)
	first(&m.ValidAccuracy, old.ValidAccuracy)
	first(&m.FullValidLoss, old.FullValidLoss)
	first(&m.FullValidAccuracy, old.FullValidAccuracy)
	first(&m.ValidChoiceAccuracy, old.ValidChoiceAccuracy)
	m.LearningRate, m.GradNorm, m.Best = cmp.Or(m.LearningRate, old.LearningRate), cmp.Or(m.GradNorm, old.GradNorm), m.Best || old.Best
	return m
}

// datasetMessages says what the trainer found in the files. The numbers are in the data of the first message too.
func datasetMessages(e child.TrainerEvent) ([]store.Event, error) {
	text := fmt.Sprintf("Training on %d examples with %d tokens", e.TrainRows, e.TrainTokens)
	if e.SharedTokens > 0 {
		text += fmt.Sprintf(" (%d of them are shared by rows and computed once)", e.SharedTokens)
	}
	if e.ValidRows > 0 {
		text += fmt.Sprintf(", validating on %d examples with %d tokens", e.ValidRows, e.ValidTokens)
	}
	data, err := json.Marshal(child.TrainerEvent{
		Type: e.Type, TrainRows: e.TrainRows, ValidRows: e.ValidRows, TrainTokens: e.TrainTokens, ValidTokens: e.ValidTokens,
		DroppedRows: e.DroppedRows, TruncatedRows: e.TruncatedRows, SharedTokens: e.SharedTokens, LongRows: e.LongRows,
	})
	if err != nil {
		return nil, fmt.Errorf("dataset event: %w", err)
	}
	events := []store.Event{{Level: "info", Type: "message", Message: text, Data: data}}
	long := child.LongRows{}
	if e.LongRows != nil {
		long = *e.LongRows
	}
	if e.DroppedRows > 0 {
		events = append(events, message("warn", "%d examples are longer than max_length and are left out%s", e.DroppedRows, longLines(long, long.TrainDropped, long.ValidDropped)))
	}
	if e.TruncatedRows > 0 {
		events = append(events, message("warn", "%d examples are longer than max_length and lose the beginning of their prompt%s",
			e.TruncatedRows, longLines(long, long.TrainTruncated, long.ValidTruncated)))
	}
	return events, nil
}

// longLines says where rows stand that are longer than max_length: the first of them.
func longLines(long child.LongRows, train, valid []int) string {
	var parts []string
	for _, file := range []struct {
		name  string
		lines []int
	}{{"training", train}, {"validation", valid}} {
		if len(file.lines) > 0 {
			parts = append(parts, fmt.Sprintf("line %s of the %s file", strings.Trim(strings.Join(strings.Fields(fmt.Sprint(file.lines)), ", "), "[]"), file.name))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return fmt.Sprintf(" (%d tokens): %s", long.MaxLength, strings.Join(parts, "; "))
}

// memoryMessage says what a job will take. The numbers are in its data too.
func memoryMessage(m child.MemoryPlan) (store.Event, error) {
	data, err := json.Marshal(m)
	if err != nil {
		return store.Event{}, fmt.Errorf("memory plan: %w", err)
	}
	text := fmt.Sprintf("Memory: %s of %s on %s: weights %s (layout %s: %s, transposed %s), adapter %s, activations of %d tokens %s",
		size(m.TotalBytes), size(m.FreeBytes), m.Device, size(m.WeightBytes), m.Layout, m.Forward, m.Backward, size(m.AdapterBytes),
		m.MicroBatchTokens, size(m.ActivationBytes))
	if m.Recompute {
		text += " (computed again in the backward pass)"
	}
	event := message("info", "%s, the rest %s", text, size(m.OverheadBytes))
	event.Data = data
	return event, nil
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
		steps[m.Step] = m.join(old) // the evaluation of a step comes as an event of its own
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
	// OpenAI's columns first.
	columns := []struct {
		name  string
		value func(metrics) *float64
	}{
		{"train_loss", func(m metrics) *float64 { return m.TrainLoss }},
		{"train_accuracy", func(m metrics) *float64 { return m.TrainAccuracy }},
		{"valid_loss", func(m metrics) *float64 { return m.ValidLoss }},
		{"valid_mean_token_accuracy", func(m metrics) *float64 { return m.ValidAccuracy }},
		{"train_choice_accuracy", func(m metrics) *float64 { return m.TrainChoiceAccuracy }},
		{"valid_choice_accuracy", func(m metrics) *float64 { return m.ValidChoiceAccuracy }},
		{"rewards_chosen", func(m metrics) *float64 { return m.RewardsChosen }},
		{"rewards_rejected", func(m metrics) *float64 { return m.RewardsRejected }},
		{"learning_rate", func(m metrics) *float64 { return unlessZero(m.LearningRate) }},
		{"grad_norm", func(m metrics) *float64 { return unlessZero(m.GradNorm) }},
	}
	line := []string{"step"}
	for _, column := range columns {
		line = append(line, column.name)
	}
	if err := w.Write(line); err != nil {
		return nil, err
	}
	for _, step := range order {
		line = append(line[:0], strconv.Itoa(step))
		for _, column := range columns {
			line = append(line, number(column.value(steps[step])))
		}
		if err := w.Write(line); err != nil {
			return nil, err
		}
	}
	w.Flush()
	return []byte(text.String()), w.Error()
}

func unlessZero(v float64) *float64 {
	if v == 0 {
		return nil
	}
	return &v
}
