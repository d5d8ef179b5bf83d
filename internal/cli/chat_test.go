package cli

import (
	"bytes"
	"testing"

	"github.com/hone-llm/hone/client"
)

// TestAnswerPrinter checks where reasoning goes.
func TestAnswerPrinter(t *testing.T) {
	t.Parallel()
	answer := []client.ChatDelta{{Reasoning: "hm, "}, {Reasoning: "so"}, {Text: "Yes"}, {Text: "."}}
	for _, test := range []struct {
		terminal bool
		deltas   []client.ChatDelta
		out, err string
	}{
		{true, answer, "\x1b[2mhm, \x1b[22m\x1b[2mso\x1b[22m\n\nYes.\n", ""},
		{false, answer, "Yes.\n", "(thinking)\nhm, so\n(answer)\n"},
		{true, answer[2:], "Yes.\n", ""},
		{false, answer[2:], "Yes.\n", ""},
		{true, answer[:1], "\x1b[2mhm, \x1b[22m\n\n\n", ""},
	} {
		var out, err bytes.Buffer
		p := &answerPrinter{streams: streams{out: &out, err: &err}, terminal: test.terminal}
		for _, delta := range test.deltas {
			if err := p.print(delta); err != nil {
				t.Fatal(err)
			}
		}
		p.end()
		if out.String() != test.out || err.String() != test.err {
			t.Errorf("terminal %v: %q and %q, want %q and %q", test.terminal, out.String(), err.String(), test.out, test.err)
		}
	}
}
