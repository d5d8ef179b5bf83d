package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/llguidance"
	"github.com/hone-llm/hone/internal/modeltest"
)

var vocabulary struct {
	once        sync.Once
	model       *llama.Model
	constraints *constraints
	err         error
}

// defaultVocabulary is the default model's vocabulary, without weights, and constraints over it.
func defaultVocabulary(t testing.TB) (*llama.Model, *constraints) {
	t.Helper()
	v := &vocabulary
	v.once.Do(func() {
		if v.model, v.err = llama.LoadModel(modeltest.Path(t), llama.ModelOptions{VocabularyOnly: true}); v.err == nil {
			v.constraints = newConstraints(v.model)
		}
	})
	if v.err != nil {
		t.Fatal(v.err)
	}
	return v.model, v.constraints
}

// write follows the constraint with the tokens of a text, and reports how many of its bytes were allowed.
func write(t testing.TB, m *llama.Model, c *constraint, text string) int {
	t.Helper()
	tokens, err := m.Tokenize(text, false, false)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, token := range tokens {
		c.Start()
		mask, err := c.Mask()
		if err != nil {
			t.Fatal(err)
		}
		if !llguidance.Allowed(mask, token) {
			return n
		}
		if err := c.Accept(token); err != nil {
			t.Fatal(err)
		}
		n += len(m.Piece(token))
	}
	return n
}

// complete reports whether a constraint allows the text, token by token as the model's tokenizer writes it, and then
// the end of the turn.
func complete(t testing.TB, m *llama.Model, c *constraint, text string) bool {
	t.Helper()
	if write(t, m, c, text) < len(text) {
		return false
	}
	if c.Stopped() {
		return true
	}
	mask, err := c.Mask()
	if err != nil {
		t.Fatal(err)
	}
	eos, _ := m.EOS()
	return llguidance.Allowed(mask, eos)
}

func TestConstraintsOfAllKinds(t *testing.T) {
	m, constraints := defaultVocabulary(t)
	person := `{"type":"object","properties":{"姓名":{"type":"string"},"n":{"type":"integer"}},"required":["姓名","n"],"additionalProperties":false}`
	for _, c := range []struct {
		name     string
		want     child.Constraint
		allow    []string
		disallow []string
	}{
		{"choice", child.Constraint{Kind: child.ConstraintChoice, Choices: []string{"北京", "上海市", "答：甲。", "Paris"}},
			[]string{"北京", "上海市", "答：甲。", "Paris"}, []string{"上海", "答:甲。", "paris", "北京。"}},
		{"object", child.Constraint{Kind: child.ConstraintJSONObject},
			[]string{`{}`, `{"a":1}`, `{"a": [1, {"b": null}], "城市": "北京，中国"}`, "{\n  \"a\": true\n}"}, []string{`[]`, `"a"`, `{"a":}`, ` {}`, `{a:1}`}},
		{"schema", child.Constraint{Kind: child.ConstraintJSONSchema, Text: person},
			[]string{`{"姓名":"张三","n":3}`, `{"姓名": "张三（老师）", "n": -12}`, "{\n    \"姓名\": \"x\",\n    \"n\": 0\n}"},
			[]string{`{"姓名":"张三"}`, `{"n":3,"姓名":"张三"}`, `{"姓名":"张三","n":3.5}`, `{"姓名":"张三","n":3,"m":1}`, `{"姓名":"张三","n":3}x`}},
		{"enum", child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"enum":["正面，积极","负面","中立\"?",7,null]}`},
			[]string{`"正面，积极"`, `"负面"`, `"中立\"?"`, `7`, `null`}, []string{`"正面"`, `"正面,积极"`, `8`, `正面`}},
		{"schema without type", child.Constraint{Kind: child.ConstraintJSONSchema, Text: ` { } `}, []string{`1`, `"x"`, `{"a":[]}`}, []string{`x`}},
		{"schema with definitions", child.Constraint{Kind: child.ConstraintJSONSchema,
			Text: `{"$ref":"#/$defs/node","$defs":{"node":{"type":"object","properties":{"v":{"type":"integer"},"next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["v","next"],"additionalProperties":false}}}`},
			[]string{`{"v":1,"next":{"v":2,"next":null}}`}, []string{`{"v":1,"next":2}`}},
		{"regex", child.Constraint{Kind: child.ConstraintRegex, Text: `(答案|结论)：[甲乙丙丁]{1,3}。`},
			[]string{"答案：甲。", "结论：乙丙丁。"}, []string{"答案:甲。", "答案：戊。", "答案：。", "答案：甲"}},
		{"regex with slashes", child.Constraint{Kind: child.ConstraintRegex, Text: `https?://[a-z./]+\d{2}`}, []string{"http://a.b/c12"}, []string{"http:/a"}},
		{"lark", child.Constraint{Kind: child.ConstraintLark, Text: "start: \"问：\" WORD \"？\" (\"！\" | tail)?\ntail: /[0-9]+/\nWORD: /[\\x{4e00}-\\x{9fff}]{2,4}/\n"},
			[]string{"问：天气？", "问：今天天气？！", "问：天气？42"}, []string{"问:天气？", "问：天？", "问：天气"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			accepts := func(text string) bool {
				made, err := constraints.New(t.Context(), c.want)
				if err != nil {
					t.Fatal(err)
				}
				defer made.Close()
				return complete(t, m, made, text)
			}
			for _, text := range c.allow {
				if !accepts(text) {
					t.Errorf("%q is not allowed", text)
				}
			}
			for _, text := range c.disallow {
				if accepts(text) {
					t.Errorf("%q is allowed", text)
				}
			}
		})
	}
}

// White space cannot go on for ever, but an indented document can be written.
func TestJSONWhiteSpaceIsBounded(t *testing.T) {
	m, constraints := defaultVocabulary(t)
	c, err := constraints.New(t.Context(), child.Constraint{Kind: child.ConstraintJSONObject})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n := write(t, m, c, "{"+strings.Repeat("\n", 200)); n > 41 {
		t.Errorf("%d bytes of white space were allowed", n-1)
	}
}

// Whatever is drawn from the masks of a schema is JSON that matches it.
func TestDrawnTextsMatchTheSchema(t *testing.T) {
	m, constraints := defaultVocabulary(t)
	random := rand.New(rand.NewPCG(1, 2))
	eos, _ := m.EOS()
	for range 20 {
		c, err := constraints.New(t.Context(), child.Constraint{Kind: child.ConstraintJSONSchema,
			Text: `{"type":"object","properties":{"标题":{"type":"string","maxLength":12},"tags":{"type":"array","items":{"enum":["甲","乙"]},"maxItems":3},"n":{"type":"integer","minimum":-5,"maximum":12}},"required":["标题","tags","n"],"additionalProperties":false}`})
		if err != nil {
			t.Fatal(err)
		}
		var text []byte
		for range 400 {
			c.Start()
			mask, err := c.Mask()
			if err != nil {
				t.Fatal(err)
			}
			var allowed []engine.Token
			each(make([]float32, m.VocabularySize()), mask, func(t engine.Token, _ float32) { allowed = append(allowed, t) })
			token := allowed[random.IntN(len(allowed))]
			if token == eos {
				break
			}
			text = append(text, m.Piece(token)...)
			if err := c.Accept(token); err != nil {
				t.Fatal(err)
			}
			if c.Stopped() {
				break
			}
		}
		c.Close()
		var got struct {
			Title *string  `json:"标题"`
			Tags  []string `json:"tags"`
			N     *int     `json:"n"`
		}
		if err := json.Unmarshal(text, &got); err != nil || !utf8.Valid(text) {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got.Title == nil || utf8.RuneCountInString(*got.Title) > 12 || got.Tags == nil || len(got.Tags) > 3 || got.N == nil || *got.N < -5 || *got.N > 12 {
			t.Errorf("%q does not match the schema", text)
		}
	}
}

func TestConstraintRefusals(t *testing.T) {
	_, constraints := defaultVocabulary(t)
	for _, c := range []struct {
		want  child.Constraint
		param string
		say   []string
	}{
		{child.Constraint{Kind: "yaml"}, "constraint", []string{"yaml"}},
		{child.Constraint{Kind: child.ConstraintChoice}, "choices", []string{"no choices"}},
		{child.Constraint{Kind: child.ConstraintRegex, Text: "("}, "regex", []string{"unclosed group"}},
		{child.Constraint{Kind: child.ConstraintRegex, Text: ""}, "regex", []string{"empty"}},
		{child.Constraint{Kind: child.ConstraintRegex, Text: "(?=a)b"}, "regex", []string{"look-around"}},
		{child.Constraint{Kind: child.ConstraintRegex, Text: "a\x00b"}, "regex", []string{"NUL"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":`}, "json_schema", []string{"no JSON"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `[]`}, "json_schema", []string{"must be a JSON object"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{} {}`}, "json_schema", []string{"followed by"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":"strange"}`}, "json_schema", []string{"strange"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":"object","dependentRequired":{}}`}, "json_schema", []string{"dependentRequired"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"$ref":"#"}`}, "json_schema", []string{"no text satisfies"}},
		{child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"oneOf":[{"type":"object"},{"type":"object","properties":{"a":{}}}]}`}, "json_schema", []string{"anyOf"}},
		{child.Constraint{Kind: child.ConstraintLark, Text: "root ::= \"a\" | \"b\"\n"}, "grammar", []string{"GBNF", "root ::=", "Lark", "start:"}},
		{child.Constraint{Kind: child.ConstraintLark, Text: "# g\n\nroot ::= [a-z]+"}, "grammar", []string{"line 3"}},
		{child.Constraint{Kind: child.ConstraintLark, Text: "start: nowhere"}, "grammar", []string{"nowhere"}},
	} {
		_, err := constraints.New(t.Context(), c.want)
		var refusal *child.Error
		if !errors.As(err, &refusal) || refusal.Code != child.CodeInvalidRequest || refusal.Param != c.param {
			t.Errorf("%+v: error is %#v, want an invalid request of %s", c.want, err, c.param)
			continue
		}
		for _, say := range c.say {
			if !strings.Contains(refusal.Message, say) {
				t.Errorf("%+v: message %q does not say %q", c.want, refusal.Message, say)
			}
		}
		if len(refusal.Message) > 800 || strings.Contains(refusal.Message, "verbose") {
			t.Errorf("%+v: message is %q", c.want, refusal.Message)
		}
	}
}

func TestConstraintsEndWithTheirContext(t *testing.T) {
	_, constraints := defaultVocabulary(t)
	constraints.compiling <- struct{}{}
	defer func() { <-constraints.compiling }()
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if _, err := constraints.New(ctx, child.Constraint{Kind: child.ConstraintRegex, Text: "only here"}); !errors.Is(err, gone) {
		t.Errorf("error is %v", err)
	}
}

// The second request with a grammar compiles nothing, and no completion changes another's constraint.
func TestCompiledGrammarsAreKept(t *testing.T) {
	m, constraints := defaultVocabulary(t)
	want := child.Constraint{Kind: child.ConstraintRegex, Text: "kept [0-9]{3}"}
	first, err := constraints.New(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	write(t, m, first, "kept 1")
	constraints.compiling <- struct{}{} // nothing can be compiled now
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				again, err := constraints.New(t.Context(), want)
				if err != nil {
					t.Error(err)
					return
				}
				if !complete(t, m, again, "kept 456") {
					t.Error("a copy does not accept the grammar's text")
				}
				again.Close()
			}
		})
	}
	wg.Wait()
	<-constraints.compiling
	if !complete(t, m, first, "23") {
		t.Error("the first completion does not go on where it was")
	}
	for i := range 2 * keptGrammars {
		c, err := constraints.New(t.Context(), child.Constraint{Kind: child.ConstraintRegex, Text: fmt.Sprint("text ", i)})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if n := len(constraints.kept); n > keptGrammars || n != constraints.recent.Len() {
		t.Errorf("%d grammars are kept, %d in the list", n, constraints.recent.Len())
	}
	if first := constraints.find(keyOf(want)); first != nil {
		t.Error("the grammar that was used longest ago is still kept")
	}
}

// A schema whose first mask is small and whose rows are not: the token after which it is too much is the request's fault.
func TestConstraintThatExplodesAtAToken(t *testing.T) {
	_, constraints := defaultVocabulary(t)
	var b strings.Builder
	for i := range 600 {
		fmt.Fprintf(&b, `,"p%d":{"type":"integer"}`, i)
	}
	c, err := constraints.New(t.Context(), child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":"object","properties":{` + b.String()[1:] + `}}`})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mask, err := c.Mask()
	if err != nil {
		t.Fatal(err)
	}
	brace := engine.Token(-1)
	each(make([]float32, 32*len(mask)), mask, func(t engine.Token, _ float32) { brace = t })
	var failure *child.Error
	for range 3 {
		if err = c.Accept(brace); err != nil {
			break
		}
		if mask, err = c.Mask(); err != nil {
			break
		}
		each(make([]float32, 32*len(mask)), mask, func(t engine.Token, _ float32) { brace = t })
	}
	if !errors.As(err, &failure) || failure.Code != child.CodeInvalidRequest || failure.Param != "constraint" {
		t.Errorf("error is %v", err)
	}
}

// A constraint that becomes too much for a step fails its completion alone, with an error that says so.
func TestConstraintThatExplodesLater(t *testing.T) {
	m, constraints := defaultVocabulary(t)
	want := child.Constraint{Kind: child.ConstraintRegex, Text: strings.Repeat("(", 8) + "a|bc" + strings.Repeat("{1,99})", 8)}
	exploding, err := constraints.New(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	defer exploding.Close()
	other, err := constraints.New(t.Context(), child.Constraint{Kind: child.ConstraintRegex, Text: "[a-z]+!"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	eos, _ := m.EOS()
	for range 200 {
		exploding.Start()
		exploding.Start() // twice is once
		other.Start()
		if _, err := other.Mask(); err != nil {
			t.Fatal(err)
		}
		mask, err := exploding.Mask()
		if err != nil {
			var failure *child.Error
			if !errors.As(err, &failure) || failure.Code != child.CodeInvalidRequest || !strings.Contains(failure.Message, "constraint") {
				t.Errorf("error is %#v", err)
			}
			if !complete(t, m, other, "abc!") {
				t.Error("the other completion does not go on")
			}
			return
		}
		next := engine.Token(-1)
		each(make([]float32, m.VocabularySize()), mask, func(t engine.Token, _ float32) {
			if t != eos {
				next = t
			}
		})
		if next < 0 {
			break
		}
		if err := exploding.Accept(next); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("nothing exploded: the test needs another constraint")
}

// threadTime is the processor time of the calling thread, which must be locked to its goroutine.
func threadTime(t testing.TB) time.Duration {
	t.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_THREAD, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// A hostile constraint is refused, or compiles, within the quarter of a second of one core that a request may cost; one
// that explodes later ends with an error. What none of them does is end the process or never return.
func TestHostileConstraintsAreCheap(t *testing.T) {
	const allowed = 250 * time.Millisecond
	m, constraints := defaultVocabulary(t)
	<-constraints.ready
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	random := rand.New(rand.NewPCG(3, 4))
	zeros := make([]float32, m.VocabularySize())
	for name, want := range hostileConstraints() {
		var spent time.Duration
		for range 2 { // a thread that something else disturbed is given a second chance
			before := threadTime(t)
			g := constraints.compile([32]byte{}, want)
			spent = threadTime(t) - before + g.took
			if spent > allowed {
				g.close()
				continue
			}
			outcome := "compiled"
			if g.err != nil {
				var refusal *child.Error
				if !errors.As(g.err, &refusal) || refusal.Code != child.CodeInvalidRequest || refusal.Param == "" {
					t.Errorf("%s: %#v", name, g.err)
				}
				outcome = g.err.Error()[:min(100, len(g.err.Error()))]
			}
			var worst time.Duration
			for steps := 0; g.err == nil && steps < 30 && !g.grammar.Stopped(); steps++ {
				before := threadTime(t)
				mask, err := g.grammar.Mask()
				worst = max(worst, threadTime(t)-before)
				if err != nil {
					outcome = err.Error()
					break
				}
				var tokens []engine.Token
				each(zeros, mask, func(t engine.Token, _ float32) { tokens = append(tokens, t) })
				if len(tokens) == 0 {
					break
				}
				if err := g.grammar.Accept(tokens[random.IntN(len(tokens))]); err != nil {
					outcome = err.Error()
					break
				}
			}
			t.Logf("%-28s %9v, dearest mask %9v: %.120q", name, spent.Round(10*time.Microsecond), worst.Round(10*time.Microsecond), outcome)
			g.close()
			break
		}
		if spent > allowed {
			t.Errorf("%s: took %v of a core, %v are allowed", name, spent, allowed)
		}
	}
}

func hostileConstraints() map[string]child.Constraint {
	repeat := strings.Repeat
	text := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return string(b)
	}
	type object = map[string]any
	// properties is a schema of n properties.
	properties := func(n int, keyword string, of func(i int) any) object {
		members := object{}
		for i := range n {
			members[fmt.Sprintf("p%d", i)] = of(i)
		}
		return object{"type": "object", keyword: members}
	}
	str := func(int) any { return object{"type": "string"} }
	values := func(n int) []string {
		list := make([]string, n)
		for i := range list {
			list[i] = fmt.Sprintf("value %d 中文", i)
		}
		return list
	}
	list := func(n int, of func(i int) any) []any {
		l := make([]any, n)
		for i := range l {
			l[i] = of(i)
		}
		return l
	}
	lines := func(n int, first, format, last string) string {
		var b strings.Builder
		b.WriteString(first)
		for i := range n {
			fmt.Fprintf(&b, format, i, i+1)
		}
		fmt.Fprintf(&b, last, n)
		return b.String()
	}
	tagged := func(i int) any {
		return object{"type": "object", "properties": object{"t": object{"const": fmt.Sprint("t", i)}, "n": object{"type": "integer", "minimum": i, "maximum": 1000 * i}}, "required": []string{"t"}}
	}
	defs := func(n, fan int) object {
		d := object{}
		for i := range n {
			members := object{}
			for k := range fan {
				members[fmt.Sprint("k", k)] = object{"$ref": fmt.Sprintf("#/$defs/d%d", (i*7+k*13)%n)}
			}
			d[fmt.Sprint("d", i)] = object{"type": "object", "properties": members}
		}
		return object{"$ref": "#/$defs/d0", "$defs": d}
	}
	hostile := map[string]child.Constraint{
		"choices":       {Kind: child.ConstraintChoice, Choices: values(1000)},
		"choices, long": {Kind: child.ConstraintChoice, Choices: []string{repeat("中", 80_000)}},
		"choices, nested": {Kind: child.ConstraintChoice, Choices: func() []string {
			var l []string
			for i := range 700 {
				l = append(l, repeat("ab", i+1)[:i+1])
			}
			return l
		}()},
	}
	for name, regex := range map[string]string{
		"counted": "(a{1,1000}){1,1000}", "counted thrice": "((a{1,100}){1,100}){1,100}", "counted deeply": repeat("(", 8) + "a|bc" + repeat("{1,99})", 8),
		"million": "a{1000000}", "any counted": ".{0,100000}", "needle": ".*a.{50}", "needles": "(.*a.{500}|.*b.{300})", "determinised": "(a|b)*a(a|b){15}",
		"words counted": `(\w+\d){1,300}`, "parentheses": repeat("(", 5000) + "a" + repeat(")", 5000), "stars": "a" + repeat("*", 10000),
		"optional": repeat("a?", 1000) + repeat("a", 1000), "look-ahead": "(?=a)b", "literal": repeat("abcdefgh", 2000), "dots": repeat(".", 16000),
		"classes": repeat(`\w`, 8000), "classes, folded": "(?i)" + repeat(`\w`, 4000), "categories": repeat(`[\p{L}\p{N}]`, 1200), "categories, folded": "(?i)" + repeat(`\pL`, 5000),
		"wide, folded": "(?i)" + repeat(`[b-\x{10ffff}]`, 1000), "wide, folded, raw": "(?si)" + repeat("[b-\U0010ffff]", 1000), "wide, folded, one": "(?i)[" + repeat(`b-\x{10ffff}`, 1000) + "]",
		"nested classes": "(?i)" + repeat(`[\W&&[^\pL]]`, 1000), "growing": lines(700, "", "(a{0,%d}b{0,%d})", "c{%d}"), "ASCII ranges, folded": "(?i)" + repeat("[ -~]", 3000),
	} {
		hostile["regex: "+name] = child.Constraint{Kind: child.ConstraintRegex, Text: regex}
	}
	for name, schema := range map[string]any{
		"enum": object{"enum": values(100_000)}, "enum, less": object{"enum": values(9000)}, "constant": object{"const": repeat("中", 50_000)},
		"properties": properties(5000, "properties", str), "properties, less": properties(900, "properties", str), "properties, any": properties(1100, "properties", func(int) any { return true }),
		"patternProperties": properties(1000, "patternProperties", str), "patternProperties, less": properties(100, "patternProperties", str),
		"anyOf": object{"anyOf": list(3000, tagged)}, "anyOf, less": object{"anyOf": list(200, tagged)}, "oneOf": object{"oneOf": list(200, tagged)}, "allOf": object{"allOf": list(300, tagged)},
		"allOf of anyOf": object{"allOf": list(12, func(i int) any {
			return object{"anyOf": list(3, func(k int) any { return properties(i+k+1, "properties", str) })}
		})},
		"references": defs(200, 20), "references, less": defs(60, 20),
		"reference to itself": object{"$ref": "#"}, "cycle": object{"$ref": "#/$defs/a", "$defs": object{"a": object{"allOf": []any{object{"$ref": "#/$defs/b"}, object{"type": "object"}}}, "b": object{"allOf": []any{object{"$ref": "#/$defs/a"}, object{"type": "object"}}}}},
		"reference elsewhere": object{"$ref": "http://127.0.0.1:1/x"}, "reference to a file": object{"$ref": "file:///etc/passwd"},
		"long string": object{"type": "string", "minLength": 1_000_000}, "bounded string": object{"type": "string", "maxLength": 100_000}, "long array": object{"type": "array", "items": object{"type": "string"}, "minItems": 1_000_000_000},
		"bounded arrays": properties(400, "properties", func(i int) any {
			return object{"type": "array", "items": object{"type": "integer"}, "minItems": i, "maxItems": 1000 + i}
		}),
		"multipleOf": object{"type": "integer", "multipleOf": 1_000_003}, "multipleOf, less": object{"type": "integer", "multipleOf": 19_997}, "multipleOf, fraction": object{"type": "number", "multipleOf": 0.100003},
		"multiples":       object{"allOf": []any{object{"type": "integer", "multipleOf": 997}, object{"type": "integer", "multipleOf": 991}, object{"type": "integer", "multipleOf": 983}}},
		"multiples apart": properties(30, "properties", func(i int) any { return object{"type": "integer", "multipleOf": 9900 + i} }),
		"numbers": properties(250, "properties", func(i int) any {
			return object{"type": "number", "minimum": -1.123456789 * float64(i), "maximum": 1e10*float64(i) + 0.987654321}
		}),
		"patterns":         properties(500, "properties", func(i int) any { return object{"type": "string", "pattern": fmt.Sprintf("a.{%d}b", i)} }),
		"patterns, folded": properties(300, "properties", func(i int) any { return object{"type": "string", "pattern": `(?i)[b-\x{10ffff}]`} }),
		"formats": properties(400, "properties", func(i int) any {
			return object{"type": "string", "format": []string{"date-time", "email", "hostname", "ipv6", "uri", "uuid"}[i%6]}
		}),
		"patterns at once": object{"allOf": []any{object{"type": "string", "pattern": "a.{30}b"}, object{"type": "string", "pattern": "c.{30}d"}, object{"type": "string", "pattern": "e.{30}f"}}},
	} {
		hostile["schema: "+name] = child.Constraint{Kind: child.ConstraintJSONSchema, Text: text(schema)}
	}
	hostile["schema: deep"] = child.Constraint{Kind: child.ConstraintJSONSchema, Text: repeat(`{"items":`, 10_000) + `{}` + repeat(`}`, 10_000)}
	hostile["schema: deep lists"] = child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"const":` + repeat(`[`, 10_000) + repeat(`]`, 10_000) + `}`}
	hostile["schema: deep without type"] = child.Constraint{Kind: child.ConstraintJSONSchema, Text: repeat(`{"items":`, 60) + `{}` + repeat(`}`, 60)}
	hostile["schema: exponent"] = child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":"number","multipleOf":1e-1000000000}`}
	for name, lark := range map[string]string{
		"left recursion": "start: start \"a\" | \"a\"", "ambiguous": "start: s\ns: s s | s s s | \"a\"", "ambiguous terminals": "start: s\ns: s s | s s s | /[a-z]+/ | /[a-z0-9]+/ | ",
		"ambiguous, empty": "start: s\ns: s s s s | /a*/ | ", "repeated": "start: (\"a\"{1,1000}){1,1000}", "repeated exponentially": "start: a~50\na: b~50\nb: c~50\nc: \"x\" | \"y\"~3",
		"parentheses": "start: " + repeat("(", 10_000) + `"a"` + repeat(")", 10_000), "chain": lines(6000, "start: a0\n", "a%d: a%d | \"z\"\n", "a%d: \"y\"\n"),
		"chain, less": lines(1300, "start: a0\n", "a%d: a%d | \"z\"\n", "a%d: \"y\"\n"), "terminals doubled": lines(40, "start: R0\n", "R%d: R%[2]d R%[2]d\n", "R%d: /[a-z]/\n"),
		"terminals": "start: " + lines(1500, "", "/[a-z]*%d[a-z]*%d/ | ", "\"z%d\"\n"), "negations": "start: X\nX: /(.*a.{20})/ & ~/(.*b.{20})/ & ~/(.*c.{20})/\n",
		"alternatives": "start: " + repeat(`"a" | `, 5000) + `"b"`, "nested grammars": "start: " + repeat("%lark { start: ", 29) + `"a"` + repeat(" }", 29), "lazy": "start: x*\nx[lazy]: /.*a.{20}/\n",
		"schema inside": `start: %json {"type":"integer","multipleOf":1000003}`, "folded inside": "start: /" + repeat(`[b-\x{10ffff}]`, 1000) + "/i\n", "substrings": `start: %regex {"substring_words":"` + repeat("a b c d e ", 3000) + `"}`,
		"literal":       `start: "` + repeat("a", 60_000) + `"`,
		"long sequence": "start: " + repeat(`"a" `, 47_000),
		"long text":     "start: \"" + repeat("ab", 95_000) + "\"",
		"long choice":   "start: " + repeat(`"ab" | `, 12_000) + `"c"`,
	} {
		hostile["lark: "+name] = child.Constraint{Kind: child.ConstraintLark, Text: lark}
	}
	return hostile
}

// BenchmarkMask is the time of one mask over the default model's vocabulary, with what accepting the token before takes,
// along a text that the constraint allows. cold starts every completion with a fresh copy of the compiled grammar, as
// requests do.
func BenchmarkMask(b *testing.B) {
	m, constraints := defaultVocabulary(b)
	<-constraints.ready
	person := `{"type":"object","properties":{"name":{"type":"string"},"city":{"enum":["北京","上海","Paris"]},"age":{"type":"integer"},"notes":{"type":"array","items":{"type":"string","maxLength":200}}},"required":["name","city","age","notes"],"additionalProperties":false}`
	for _, c := range []struct {
		name string
		want child.Constraint
		text string
	}{
		{"schema", child.Constraint{Kind: child.ConstraintJSONSchema, Text: person},
			`{"name": "Ada Lovelace, the first to write a program", "city": "北京", "age": 36, "notes": ["She wrote notes on the engine.", "一个关于她的故事，很长。", "third"]}`},
		{"inside a string", child.Constraint{Kind: child.ConstraintJSONSchema, Text: person},
			`{"name": "` + strings.Repeat("the quick brown fox jumps over the lazy dog, again and again; ", 8) + `"`},
		{"inside a bounded string", child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":"string","minLength":2000}`},
			`"` + strings.Repeat("the quick brown fox jumps over the lazy dog, again and again; ", 8)},
		{"object", child.Constraint{Kind: child.ConstraintJSONObject},
			`{"a": [1, 2, {"b": "a longer text in the middle"}], "c": {"d": null, "e": "文字，文字"}}`},
		{"regex", child.Constraint{Kind: child.ConstraintRegex, Text: `(答案|结论)：.{1,200}。`}, "答案：这是一个比较长的回答，有很多字。"},
		{"choice", child.Constraint{Kind: child.ConstraintChoice, Choices: []string{"北京市海淀区", "上海市浦东新区", "a rather long choice of many words"}}, "a rather long choice of many words"},
	} {
		tokens, err := m.Tokenize(c.text, false, false)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(c.name, func(b *testing.B) {
			var worst time.Duration
			for b.Loop() {
				made, err := constraints.New(b.Context(), c.want)
				if err != nil {
					b.Fatal(err)
				}
				for _, token := range tokens {
					before := time.Now()
					if _, err := made.Mask(); err != nil {
						b.Fatal(err)
					}
					worst = max(worst, time.Since(before))
					if err := made.Accept(token); err != nil {
						b.Fatal(err)
					}
				}
				made.Close()
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*len(tokens)), "µs/mask")
			b.ReportMetric(float64(worst.Microseconds()), "µs-worst")
		})
	}
	b.Run("copy of a kept grammar", func(b *testing.B) {
		for b.Loop() {
			made, err := constraints.New(b.Context(), child.Constraint{Kind: child.ConstraintJSONSchema, Text: person})
			if err != nil {
				b.Fatal(err)
			}
			made.Close()
		}
	})
	b.Run("vocabulary", func(b *testing.B) {
		for b.Loop() {
			tokenizer, err := vocabularyOf(m)
			if err != nil {
				b.Fatal(err)
			}
			tokenizer.Close()
		}
	})
}

// BenchmarkConstrainedStreams compares eight streams of 48 tokens in the middle of a JSON string with eight free ones,
// one after the other, and reports the median of constrained over free throughput: 1 costs nothing.
func BenchmarkConstrainedStreams(b *testing.B) {
	r, err := New(Options{ModelDir: modelDir(b), ContextTokens: 1024, Sequences: 8})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	run := func(want *child.Constraint) time.Duration {
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				req := child.GenerateRequest{Messages: chat(fmt.Sprint("Tell a long story about the number ", i)), MaxTokens: 48, IgnoreEOS: true, TopP: 1, Constraint: want}
				if err := r.Generate(b.Context(), req, func(child.GenerateEvent) error { return nil }); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		return time.Since(begin)
	}
	inString := &child.Constraint{Kind: child.ConstraintJSONSchema, Text: `{"type":"string","minLength":2000}`}
	run(nil) // the prompts are in the prefix cache from here on
	run(inString)
	var ratios []float64
	for b.Loop() {
		free := run(nil)
		ratios = append(ratios, free.Seconds()/run(inString).Seconds())
	}
	slices.Sort(ratios)
	b.ReportMetric(ratios[len(ratios)/2], "of-free-throughput")
}
