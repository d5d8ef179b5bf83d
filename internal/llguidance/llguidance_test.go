package llguidance_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llguidance"
)

// vocabulary is every byte, some longer pieces, a control token and the end of the turn.
type vocabulary struct {
	pieces  [][]byte
	special []bool
	eos     engine.Token
}

func newVocabulary(longer ...string) vocabulary {
	var v vocabulary
	for b := range 256 {
		v.pieces = append(v.pieces, []byte{byte(b)})
	}
	for _, piece := range longer {
		v.pieces = append(v.pieces, []byte(piece))
	}
	v.pieces = append(v.pieces, []byte("A<control>"), []byte("<eos>"), nil)
	v.special = make([]bool, len(v.pieces))
	v.special[len(v.pieces)-3] = true
	v.special[len(v.pieces)-2] = true
	v.eos = engine.Token(len(v.pieces) - 2)
	return v
}

func (v vocabulary) tokenizer(t *testing.T) *llguidance.Tokenizer {
	t.Helper()
	tokenizer, err := llguidance.NewTokenizer(v.pieces, v.special, v.eos)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tokenizer.Close() })
	return tokenizer
}

// allowed lists the pieces that a constraint allows next.
func (v vocabulary) allowed(t *testing.T, c *llguidance.Constraint) []string {
	t.Helper()
	mask, err := c.Mask()
	if err != nil {
		t.Fatal(err)
	}
	var pieces []string
	for token, piece := range v.pieces {
		if llguidance.Allowed(mask, engine.Token(token)) {
			pieces = append(pieces, string(piece))
		}
	}
	return pieces
}

// texts walks every path of single-byte tokens that the constraint allows, and returns the texts that it ends at.
func (v vocabulary) texts(t *testing.T, tokenizer *llguidance.Tokenizer, choices []string) []string {
	t.Helper()
	var found []string
	var walk func(prefix string)
	walk = func(prefix string) {
		c, err := tokenizer.Choices(choices)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, b := range []byte(prefix) {
			if err := c.Accept(engine.Token(b)); err != nil {
				t.Fatalf("after %q: %v", prefix, err)
			}
		}
		mask, err := c.Mask()
		if err != nil {
			t.Fatal(err)
		}
		mask = append([]uint32(nil), mask...)
		if llguidance.Allowed(mask, v.eos) != c.Complete() {
			t.Errorf("after %q: end of turn allowed is %v, complete is %v", prefix, !c.Complete(), c.Complete())
		}
		if llguidance.Allowed(mask, v.eos) {
			found = append(found, prefix)
		}
		for b := range 256 {
			if llguidance.Allowed(mask, engine.Token(b)) {
				walk(prefix + string([]byte{byte(b)}))
			}
		}
	}
	walk("")
	return found
}

func TestChoicesAllowExactlyTheChoices(t *testing.T) {
	t.Parallel()
	tests := map[string][]string{
		"letters":           {"A", "B", "C", "D"},
		"one":               {"only"},
		"prefix of another": {"A", "AB", "ABC"},
		"quotes":            {`"`, `a"b`, `'`, `"""`},
		"backslashes":       {`\`, `\n`, `\x41`, `\\`, `\u0041`},
		"control":           {"line\nbreak", "tab\t", "\r\n", "nul\x00byte", "\x7f", "a\u0085b"},
		"chinese":           {"北京", "上海", "答案是甲。"},
		"emoji":             {"👍🏽", "é"},
		"regex characters":  {".*", "[a-z]+", "(x|y)", "/re/", "a{2}", "^$"},
		"lark syntax":       {`start: "x"`, "| y", "%ignore", "// comment", "#", `"x"i`, "<eos>", "A<control>"},
		"html":              {"<b>", "a&b"},
		"line separators":   {"a\u2028b\u2029c"},
		"spaces":            {" ", "  ", " A", "A "},
	}
	v := newVocabulary("AB", "北", "BC")
	tokenizer := v.tokenizer(t)
	for name, choices := range tests {
		t.Run(name, func(t *testing.T) {
			found := v.texts(t, tokenizer, choices)
			want := map[string]bool{}
			for _, choice := range choices {
				want[choice] = true
			}
			got := map[string]bool{}
			for _, text := range found {
				got[text] = true
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("texts that the constraint allows (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLongerPiecesAndControlTokens(t *testing.T) {
	t.Parallel()
	v := newVocabulary("AB", "ABCD", "北", "Aa")
	tokenizer := v.tokenizer(t)
	c, err := tokenizer.Choices([]string{"ABC", "北京"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if diff := cmp.Diff([]string{"A", "\xe5", "AB", "北"}, v.allowed(t, c)); diff != "" {
		t.Errorf("first tokens (-want +got):\n%s", diff)
	}
	if err := c.Accept(256); err != nil { // AB
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"C"}, v.allowed(t, c)); diff != "" {
		t.Errorf("after AB (-want +got):\n%s", diff)
	}
	if c.Stopped() || c.Complete() {
		t.Error("stopped or complete in the middle of a choice")
	}
	if err := c.Accept('C'); err != nil {
		t.Fatal(err)
	}
	if !c.Stopped() {
		t.Error("not stopped at the end of a choice that nothing extends")
	}
	if diff := cmp.Diff([]string{"<eos>"}, v.allowed(t, c)); diff != "" {
		t.Errorf("at the end (-want +got):\n%s", diff)
	}
}

func TestEqualPiecesUseTheHighestToken(t *testing.T) {
	t.Parallel()
	v := newVocabulary("A") // token 256, as well as the byte fallback 'A'
	c, err := v.tokenizer(t).Choices([]string{"A", "B"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mask, err := c.Mask()
	if err != nil {
		t.Fatal(err)
	}
	if llguidance.Allowed(mask, 'A') || !llguidance.Allowed(mask, 256) || !llguidance.Allowed(mask, 'B') {
		t.Error("want token 256 and B, not the byte fallback of A")
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	v := newVocabulary()
	tokenizer := v.tokenizer(t)
	for name, choices := range map[string][]string{
		"none":      nil,
		"empty":     {"A", ""},
		"repeated":  {"A", "B", "A"},
		"not UTF-8": {"\xff"},
	} {
		_, err := tokenizer.Choices(choices)
		var grammar *llguidance.GrammarError
		if !errors.As(err, &grammar) {
			t.Errorf("%s: error is %v, want a *GrammarError", name, err)
		}
	}
	for kind, text := range map[string]string{
		llguidance.KindRegex:      "(",
		llguidance.KindJSONSchema: `{"type": 3}`,
		llguidance.KindLark:       "start: nowhere",
		"no such kind":            "",
	} {
		_, err := tokenizer.New(kind, text)
		var grammar *llguidance.GrammarError
		if !errors.As(err, &grammar) || grammar.Message == "" {
			t.Errorf("%s: error is %v, want a *GrammarError with a message", kind, err)
		}
	}
	if _, err := llguidance.NewTokenizer(v.pieces, v.special[1:], v.eos); err == nil {
		t.Error("fewer flags than pieces: no error")
	}
	if _, err := llguidance.NewTokenizer(v.pieces, v.special, engine.Token(len(v.pieces))); err == nil {
		t.Error("end of turn outside the vocabulary: no error")
	}

	c, err := tokenizer.Choices([]string{"A"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Accept('B'); err == nil {
		t.Error("a token outside the mask: no error")
	}
	if err := c.Accept(engine.Token(len(v.pieces))); err == nil {
		t.Error("a token outside the vocabulary: no error")
	}
	c.Close()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Mask(); !errors.Is(err, llguidance.ErrClosed) {
		t.Errorf("mask after Close: %v", err)
	}
	if err := c.Accept('A'); !errors.Is(err, llguidance.ErrClosed) {
		t.Errorf("accept after Close: %v", err)
	}
}

func TestConstraintOutlivesTheTokenizer(t *testing.T) {
	t.Parallel()
	v := newVocabulary()
	tokenizer := v.tokenizer(t)
	c, err := tokenizer.Choices([]string{"AB"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	tokenizer.Close()
	tokenizer.Close()
	if _, err := tokenizer.Choices([]string{"A"}); !errors.Is(err, llguidance.ErrClosed) {
		t.Errorf("choices after Close: %v", err)
	}
	if diff := cmp.Diff([]string{"A"}, v.allowed(t, c)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestOtherGrammars(t *testing.T) {
	t.Parallel()
	v := newVocabulary()
	tokenizer := v.tokenizer(t)
	accepts := func(kind, text, completion string) bool {
		t.Helper()
		c, err := tokenizer.New(kind, text)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, b := range []byte(completion) {
			mask, err := c.Mask()
			if err != nil {
				t.Fatal(err)
			}
			if !llguidance.Allowed(mask, engine.Token(b)) {
				return false
			}
			if err := c.Accept(engine.Token(b)); err != nil {
				t.Fatal(err)
			}
		}
		return c.Complete()
	}
	if !accepts(llguidance.KindRegex, "[0-9]{2}", "42") || accepts(llguidance.KindRegex, "[0-9]{2}", "4a") {
		t.Error("regex")
	}
	schema := `{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"],"additionalProperties":false}`
	if !accepts(llguidance.KindJSONSchema, schema, `{"n": 7}`) || accepts(llguidance.KindJSONSchema, schema, `{"m": 7}`) {
		t.Error("JSON schema")
	}
}

func TestClone(t *testing.T) {
	t.Parallel()
	v := newVocabulary()
	c, err := v.tokenizer(t).New(llguidance.KindRegex, "a[bc]d")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Accept('a'); err != nil {
		t.Fatal(err)
	}
	clone, err := c.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer clone.Close()
	if err := c.Accept('b'); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"d"}, v.allowed(t, c)); diff != "" {
		t.Errorf("the original (-want +got):\n%s", diff)
	}
	if c.Compiled() <= 0 {
		t.Error("compiling took no time")
	}
	c.Close()
	if _, err := c.Clone(); !errors.Is(err, llguidance.ErrClosed) {
		t.Errorf("clone after Close: %v", err)
	}
	if diff := cmp.Diff([]string{"b", "c"}, v.allowed(t, clone)); diff != "" {
		t.Errorf("the clone (-want +got):\n%s", diff)
	}
}

// Check measures what New would need, and lets through what people write.
func TestCheck(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ kind, text, say string }{
		{llguidance.KindRegex, `(?i)[a-z0-9_-]{1,64}@[a-z-]+\.(com|org)`, ""},
		{llguidance.KindRegex, `\p{Han}+[，。！？]`, ""},
		{llguidance.KindRegex, "(?i)" + strings.Repeat(`[b-\x{10ffff}]`, 50), "regular expressions"},
		{llguidance.KindRegex, strings.Repeat("a", 20_000), "at most"},
		{llguidance.KindRegex, "\xff", "UTF-8"},
		{llguidance.KindJSONSchema, `{"type":"number","multipleOf":0.01}`, ""},
		{llguidance.KindJSONSchema, `{"properties":{"a":{"multipleOf":5},"b":{"multipleOf":0.25},"c":{"multipleOf":60}}}`, ""},
		{llguidance.KindJSONSchema, `{"properties":{"multipleOf":{"type":"integer"},"pattern":{"type":"string"},"minimum":{}}}`, ""},
		{llguidance.KindJSONSchema, `{"multiple\u004ff":1000003}`, "multipleOf"},
		{llguidance.KindJSONSchema, `{"multipleOf":1e400}`, "multipleOf"},
		{llguidance.KindJSONSchema, `{"allOf":[{"multipleOf":499},{"multipleOf":503}]}`, "multipleOf"},
		{llguidance.KindJSONSchema, strings.Repeat(`{"items":`, 65) + "1" + strings.Repeat("}", 65), "deeper"},
		{llguidance.KindJSONSchema, `true`, "must be a JSON object"},
		{llguidance.KindLark, "start: %json {\"type\": \"object\"} \"::=\"\n", ""},
		{llguidance.KindLark, "root   ::= item+\nitem ::= \"a\"", "line 1 is GBNF"},
		{llguidance.KindLark, `start: %json {"multipleOf": 1000003}`, "multipleOf"},
		{llguidance.KindLark, `start: %json {"type": }`, "%json"},
		{llguidance.KindLark, strings.Repeat("a: b\n", 3000), "rules"},
	} {
		err := llguidance.Check(c.kind, c.text)
		var refused *llguidance.GrammarError
		switch {
		case c.say == "" && err != nil:
			t.Errorf("%s %.60q: %v", c.kind, c.text, err)
		case c.say != "" && (!errors.As(err, &refused) || !strings.Contains(refused.Message, c.say)):
			t.Errorf("%s %.60q: error is %v, want one that says %q", c.kind, c.text, err, c.say)
		}
	}
}

// The header in this directory must be the one of the library that is linked.
func TestHeaderIsTheLibrarysOwn(t *testing.T) {
	native := os.Getenv("HONE_NATIVE")
	if native == "" {
		native, _, _ = strings.Cut(os.Getenv("LIBRARY_PATH"), ":")
	}
	if native == "" {
		t.Fatal("neither HONE_NATIVE nor LIBRARY_PATH is set: export HONE_NATIVE=$(scripts/native.sh); . scripts/env.sh")
	}
	linked, err := os.ReadFile(filepath.Join(native, "llguidance.h"))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := os.ReadFile("llguidance.h")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(linked, ours) {
		t.Errorf("internal/llguidance/llguidance.h differs from %s/llguidance.h: copy the latter", native)
	}
}
