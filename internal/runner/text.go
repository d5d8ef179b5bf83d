package runner

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/child"
)

// text turns the pieces of a completion's tokens into what may be shown: whole UTF-8 characters, and never a part of
// what may become a stop string.
type text struct {
	stops [][]byte
	deaf  int // so many tokens are still shown without regard to stop strings

	pending []byte // pieces not shown yet
	shown   int    // bytes shown before pending
	tokens  []pendingToken
}

type pendingToken struct {
	start, end int // bytes of the completion
	logProb    child.TokenLogProb
}

// newText returns the text of a completion that ends before the first of the stop strings. A stop string counts from the
// token after minTokens on: what is written before neither ends the completion nor is a beginning of one.
func newText(stops []string, minTokens int) *text {
	t := &text{deaf: minTokens}
	for _, s := range stops {
		t.stops = append(t.stops, []byte(s))
	}
	return t
}

// add appends a token's piece and returns what can be shown now with the log-probabilities of its tokens; stopped
// says that a stop string was found: the completion ends before it. logProb is nil if none were asked for.
func (t *text) add(piece []byte, logProb *child.TokenLogProb) (show string, logProbs []child.TokenLogProb, stopped bool) {
	start := t.shown + len(t.pending)
	if logProb != nil {
		t.tokens = append(t.tokens, pendingToken{start, start + len(piece), *logProb})
	}
	t.pending = append(t.pending, piece...)
	if t.deaf > 0 {
		t.deaf--
		return t.take(len(t.pending) - incompleteRune(t.pending))
	}
	if at := t.findStop(); at >= 0 {
		t.pending = t.pending[:at]
		show, logProbs = t.finish()
		return show, logProbs, true
	}
	return t.take(len(t.pending) - t.held())
}

// finish returns what was held back; an incomplete character at the end becomes U+FFFD.
func (t *text) finish() (show string, logProbs []child.TokenLogProb) {
	end := t.shown + len(t.pending)
	// A token that lies in the stop string is no part of the completion.
	for i, token := range t.tokens {
		if token.start >= end && token.end > token.start {
			t.tokens = t.tokens[:i]
			break
		}
	}
	for i := range t.tokens {
		t.tokens[i].end = min(t.tokens[i].end, end)
	}
	show, logProbs, _ = t.take(len(t.pending))
	return show, logProbs
}

func (t *text) take(n int) (show string, logProbs []child.TokenLogProb, stopped bool) {
	show = validUTF8(t.pending[:n])
	t.pending = t.pending[n:]
	t.shown += n
	whole := 0
	for whole < len(t.tokens) && t.tokens[whole].end <= t.shown {
		logProbs = append(logProbs, t.tokens[whole].logProb)
		whole++
	}
	t.tokens = t.tokens[whole:]
	return show, logProbs, false
}

// findStop returns where in pending the stop string begins that is complete first, -1 if there is none: the one that
// would have ended the completion had it come byte by byte. Of several that end together it is the longest.
func (t *text) findStop() int {
	first, end := -1, len(t.pending)+1
	for _, stop := range t.stops {
		at := bytes.Index(t.pending, stop)
		if n := at + len(stop); at >= 0 && (n < end || n == end && at < first) {
			first, end = at, n
		}
	}
	return first
}

// held returns how many bytes at the end of pending must wait: the beginning of a stop string or of a character.
func (t *text) held() int {
	held := incompleteRune(t.pending)
	for _, stop := range t.stops {
		for n := min(len(stop)-1, len(t.pending)); n > held; n-- {
			if bytes.HasSuffix(t.pending, stop[:n]) {
				held = n
				break
			}
		}
	}
	// What stays must not begin inside of a character either.
	for held < len(t.pending) && held > 0 && !utf8.RuneStart(t.pending[len(t.pending)-held]) {
		held++
	}
	return held
}

// incompleteRune returns the length of a UTF-8 character's beginning at the end of b, 0 if b ends with a whole one or
// with bytes that can begin none.
func incompleteRune(b []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		if tail := b[len(b)-n:]; utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return n
		}
	}
	return 0
}

// validUTF8 replaces every byte that is no part of a character by U+FFFD.
func validUTF8(b []byte) string {
	if utf8.Valid(b) {
		return string(b)
	}
	var s strings.Builder
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		s.WriteRune(r) // utf8.RuneError, U+FFFD, for an invalid byte
		b = b[n:]
	}
	return s.String()
}
