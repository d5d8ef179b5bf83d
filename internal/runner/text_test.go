package runner

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/child"
)

func TestText(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		stops   []string
		pieces  []string
		want    []string // shown after each piece, then by finish unless stopped
		stopped bool
	}{
		{"plain", nil, []string{"a", "b"}, []string{"a", "b", ""}, false},
		{"split character", nil, []string{"\xe4", "\xb8\xad", "x"}, []string{"", "中", "x", ""}, false},
		{"incomplete at the end", nil, []string{"a\xe4\xb8"}, []string{"a", "\uFFFD\uFFFD"}, false},
		{"invalid inside", nil, []string{"a\xffb"}, []string{"a\uFFFDb", ""}, false},
		{"stop in one piece", []string{"END"}, []string{"x", "yENDz"}, []string{"x", "y"}, true},
		{"stop across pieces", []string{"END"}, []string{"xE", "N", "D"}, []string{"x", "", ""}, true},
		{"not a stop after all", []string{"END"}, []string{"xE", "N", "x"}, []string{"x", "", "ENx", ""}, false},
		{"held at the end", []string{"END"}, []string{"xEN"}, []string{"x", "EN"}, false},
		{"overlapping beginnings", []string{"aab"}, []string{"a", "a", "a", "b"}, []string{"", "", "a", ""}, true},
		{"first of two stops", []string{"zz", "b"}, []string{"abzz"}, []string{"a"}, true},
		{"stop of several bytes", []string{"中文"}, []string{"x中", "文y"}, []string{"x", ""}, true},
		{"character before a held stop", []string{"\nQ"}, []string{"é\n", "A"}, []string{"é", "\nA", ""}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			text := newText(c.stops)
			var got []string
			stopped := false
			for i, piece := range c.pieces {
				show, _, stop := text.add([]byte(piece), nil)
				got = append(got, show)
				if stopped = stop; stop {
					if i != len(c.pieces)-1 {
						t.Errorf("stopped after piece %d", i)
					}
					break
				}
			}
			if !stopped {
				show, _ := text.finish()
				got = append(got, show)
			}
			if diff := cmp.Diff(c.want, got); diff != "" || stopped != c.stopped {
				t.Errorf("stopped %v, want %v; shown (-want +got):\n%s", stopped, c.stopped, diff)
			}
		})
	}
}

// A token's log-probability comes with the event that shows its last byte; those of a stop string do not come.
func TestTextLogProbs(t *testing.T) {
	t.Parallel()
	text := newText([]string{"END"})
	var events []string
	for _, piece := range []string{"a", "\xe4", "\xb8\xad", " E", "N", "D"} {
		show, logProbs, _ := text.add([]byte(piece), &child.TokenLogProb{Token: piece})
		var tokens []string
		for _, p := range logProbs {
			tokens = append(tokens, p.Token)
		}
		events = append(events, show+"|"+strings.Join(tokens, ","))
	}
	want := []string{"a|a", "|", "中|\xe4,\xb8\xad", " |", "|", "| E"}
	if diff := cmp.Diff(want, events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
