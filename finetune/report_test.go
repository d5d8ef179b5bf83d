package finetune

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func reportOf(t *testing.T, method, file string) *FileReport {
	t.Helper()
	report, err := validateDataset(t.Context(), strings.NewReader(file), method, nil)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func question(q, answer string) string {
	return fmt.Sprintf(`{"messages":[{"role":"system","content":"s"},{"role":"user","content":%q},{"role":"assistant","content":%q}]}`, q, answer) + "\n"
}

func TestReport(t *testing.T) {
	t.Parallel()
	file := question("1?", "A") + "\n" + question("2?", "B") + question("3?", " A") +
		`{"id": 7, "messages":[{"content":" 1? \n","role":"user"}, {"role":"assistant","content":"A"}]}` + "\n" +
		`{"id":8,"messages": [ {"role":"user","content":"1?"},{"content":"A", "role":"assistant","weight":null}],"tools":[]}` + "\n" + question("2?", "B") +
		`{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"no","weight":0},{"role":"user","content":"longer?"},{"role":"assistant","content":"B"}]}` + "\n"
	got := reportOf(t, Supervised, file)
	want := &FileReport{
		Rows: 7, Errors: []LineProblem{}, Messages: map[string]int{"system": 4, "user": 8, "assistant": 8}, UntrainedAnswers: 1,
		Characters: 743, LongestCharacters: 166, LongestLine: 8,
		Duplicates: Repeated{Rows: 2, First: []SameLine{{6, 5}, {7, 3}}}, Answers: map[string]int{"A": 4, "B": 3},
	}
	ignore := []cmp.Option{cmpopts.IgnoreUnexported(FileReport{}), cmpopts.IgnoreFields(FileReport{}, "Characters", "LongestCharacters")}
	if diff := cmp.Diff(want, got, ignore...); diff != "" || got.Characters < 700 || got.LongestCharacters < 150 {
		t.Errorf("(-want +got)\n%s", diff)
	}

	valid := reportOf(t, Supervised, question("9?", "C")+question("2?", "B")+question("9?", "C")+question("3?", "C"))
	report := &Report{Valid: true, Training: *got, Validation: valid, Overlap: overlap(got, valid)}
	events, err := report.events()
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, e := range events {
		texts = append(texts, e.Level+": "+e.Message)
	}
	wantTexts := []string{
		"info: Training file: 7 rows, 20 messages (assistant 8, system 4, user 8), 1 of weight 0, answers A 4, B 3; " +
			"validation file: 4 rows, 12 messages (assistant 4, system 4, user 4), answers B 1, C 3",
		"warn: The training file has 2 duplicate rows; the first is line 6, the same as line 5",
		"warn: The validation file has 1 duplicate row; the first is line 3, the same as line 1",
		"warn: The validation file has 1 row that the training file has too, the first in line 2 (line 3 there): what is measured on them says little about new rows",
		`warn: The answer "C" is in the validation file and never in the training file`,
	}
	if diff := cmp.Diff(wantTexts, texts); diff != "" {
		t.Errorf("events (-want +got)\n%s", diff)
	}
	var back Report
	if err := json.Unmarshal(events[0].Data, &back); err != nil || back.Overlap.Rows != 1 || back.Training.Duplicates.Rows != 2 {
		t.Errorf("data %s, %v", events[0].Data, err)
	}
}

// Rows of every kind are compared, and those with too many answers have no balance.
func TestReportKinds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		method, row, other string
		messages, answers  int
	}{
		"completion": {Supervised, `{"prompt":"q","completion":"a"}`, `{"prompt":"q","completion":"b"}`, 0, 2},
		"text":       {Supervised, `{"text":"q a"}`, `{"text":"q b"}`, 0, 0},
		"chats": {Supervised, `{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"a"}]}`,
			`{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"b"}]}`, 8, 2},
		"pairs":  {DPO, pair, strings.Replace(pair, `"b"`, `"c"`, 1), 0, 0},
		"OpenAI": {DPO, openAI, strings.Replace(openAI, `"content":"b"`, `"content":"c"`, 1), 12, 0},
		"tools":  {Supervised, tools, strings.Replace(tools, `"f"`, `"g"`, 1), 16, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := reportOf(t, test.method, strings.Join([]string{test.row, test.other, test.other, test.row}, "\n"))
			total := 0
			for _, n := range got.Messages {
				total += n
			}
			want := []SameLine{{3, 2}, {4, 1}}
			if !slices.Equal(got.Duplicates.First, want) || total != test.messages || len(got.Answers) != test.answers {
				t.Errorf("duplicates %v, %d messages, answers %v", got.Duplicates.First, total, got.Answers)
			}
		})
	}
	var many strings.Builder
	for i := range 100 {
		many.WriteString(question("?", fmt.Sprint(i%20)))
	}
	if got := reportOf(t, Supervised, many.String()); got.Answers != nil || got.Duplicates.Rows != 80 || len(got.Duplicates.First) != 20 ||
		got.Duplicates.First[0] != (SameLine{21, 1}) {
		t.Errorf("answers %v, duplicates %d %v", got.Answers, got.Duplicates.Rows, got.Duplicates.First)
	}
}

func TestValidateChoices(t *testing.T) {
	t.Parallel()
	_, err := validateDataset(t.Context(), strings.NewReader(question("1", "A")+question("2", " B ")+question("3", "E")+`{"text":"A"}`), Supervised, []string{"A", "B"})
	want := `line 3: the last answer is "E"; expected one of the choices: A, B` + "\n" +
		"line 4: no answer that could be one of the choices; expected an assistant message or a completion"
	if err == nil || err.Error() != want {
		t.Errorf("%v", err)
	}
}
