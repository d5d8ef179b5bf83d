package runner

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/child"
	"pgregory.net/rapid"
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
			text := newText(c.stops, 0)
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
	text := newText([]string{"END"}, 0)
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

// split cuts a text into pieces at any bytes.
func split(t *rapid.T, text string) []string {
	var pieces []string
	for len(text) > 0 {
		n := rapid.IntRange(0, min(len(text), 5)).Draw(t, "piece")
		pieces, text = append(pieces, text[:n]), text[n:]
	}
	return pieces
}

// shown is all that a completion of these pieces shows, and what it shows at each piece.
func shown(stops []string, minTokens int, pieces []string) (all string, each []string, stopped bool) {
	text := newText(stops, minTokens)
	for _, piece := range pieces {
		show, _, stop := text.add([]byte(piece), nil)
		all, each = all+show, append(each, show)
		if stop {
			return all, each, true
		}
	}
	show, _ := text.finish()
	return all + show, append(each, show), false
}

// However a text comes in pieces, the same is shown: all up to where the first stop string begins, in whole characters,
// and no beginning of a stop string that came to its end.
func TestTextOfAnyPieces(t *testing.T) {
	t.Parallel()
	letters := rapid.SliceOf(rapid.SampledFrom([]string{"a", "b", "ab", "\n", "。", "中", "文", "！", "é", "👍🏽", " ", "\xff", "\xe4\xb8"}))
	stop := rapid.Map(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "\n", "。", "中", "！", "é", "👍🏽"}), 1, 4), func(l []string) string { return strings.Join(l, "") })
	rapid.Check(t, func(t *rapid.T) {
		text := strings.Join(letters.Draw(t, "text"), "")
		stops := rapid.SliceOfN(stop, 0, 3).Draw(t, "stops")
		end, found := len(text), false
		complete := -1 // bytes after which the first stop string is complete
		for n := range len(text) + 1 {
			for _, s := range stops {
				if strings.HasSuffix(text[:n], s) && (complete < 0 || n == complete) {
					complete, found = n, true
					end = min(end, n-len(s))
				}
			}
		}
		// Byte by byte, the completion ends as soon as a stop string is complete.
		var bytes []string
		for i := range len(text) {
			bytes = append(bytes, text[i:i+1])
		}
		got, _, stopped := shown(stops, 0, bytes)
		if want := validUTF8([]byte(text[:end])); got != want || stopped != found {
			t.Fatalf("byte by byte: shown %q, stopped %v, want %q, %v", got, stopped, want, found)
		}
		pieces := split(t, text)
		all, each, stopped := shown(stops, 0, pieces)
		if stopped != found {
			t.Fatalf("pieces %q: stopped %v, want %v", pieces, stopped, found)
		}
		for _, s := range stops {
			if strings.Contains(all, s) {
				t.Fatalf("pieces %q: shown %q holds the stop string %q", pieces, all, s)
			}
		}
		if all != got {
			t.Fatalf("pieces %q: shown %q, byte by byte %q", pieces, all, got)
		}
		for _, show := range each {
			if !utf8.ValidString(show) {
				t.Fatalf("pieces %q: %q is not valid UTF-8", pieces, show)
			}
		}
	})
}

// Before min_tokens, a stop string is text like any other, also where it goes on afterwards.
func TestTextMinTokens(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		min    int
		pieces []string
		want   string
		stop   bool
	}{
		{1, []string{"END", "x", "END"}, "ENDx", true},
		{2, []string{"E", "N", "D"}, "END", false},
		{3, []string{"\xe4", "\xb8", "\xad", "END"}, "中", true},
		{9, []string{"a", "END"}, "aEND", false},
	} {
		if got, _, stopped := shown([]string{"END"}, c.min, c.pieces); got != c.want || stopped != c.stop {
			t.Errorf("min_tokens %d, %q: %q, stopped %v, want %q, %v", c.min, c.pieces, got, stopped, c.want, c.stop)
		}
	}
}
