package llguidance

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Limits of a grammar. The library compiles in the caller's process and cannot be interrupted, and its own limits
// (ParserLimits) do not cover all that takes time: a multipleOf of a million takes it five seconds, a hundred ranges of
// a case-insensitive regular expression half a second, 1,000 patternProperties minutes. So the time is estimated before,
// in microseconds as measured on one core of a Zen 4, and what is estimated at more than maxCost is refused.
const (
	maxCost       = 100_000
	maxDepth      = 64 // of a JSON schema's values
	maxSchema     = 256 << 10
	maxRegex      = 16 << 10
	maxLark       = 64 << 10  // without the schemas in it
	maxLarkJSON   = 256 << 10 // with them: those of 128 tools are long
	maxChoiceText = 256 << 10 // of all choices together
)

// Check refuses a grammar that is too large, too deep or too slow to compile, with a *GrammarError that says which, and
// one that is written in a dialect that the library does not read. That Check accepts it does not make it a valid one.
func Check(kind, text string) error {
	refuse := func(format string, args ...any) error {
		return &GrammarError{Kind: kind, Message: fmt.Sprintf(format, args...)}
	}
	if !utf8.ValidString(text) {
		return refuse("the text is not valid UTF-8")
	}
	if i := strings.IndexByte(text, 0); i >= 0 {
		return refuse("NUL byte at offset %d", i)
	}
	limit := map[string]int{KindRegex: maxRegex, KindJSONSchema: maxSchema, KindLark: maxLarkJSON}[kind]
	if len(text) > limit && kind != KindJSONObject && limit > 0 {
		return refuse("the text has %d bytes, at most %d are allowed", len(text), limit)
	}
	var cost cost
	switch kind {
	case KindRegex:
		if text == "" {
			return refuse("the regular expression is empty")
		}
		cost.regex(text)
	case KindJSONSchema:
		schema, err := decodeSchema(text)
		if err != nil {
			return refuse("%v", err)
		}
		if _, ok := schema.(map[string]any); !ok {
			return refuse("the schema must be a JSON object")
		}
		cost.schema(schema)
	case KindLark:
		if line, rule := gbnf(text); rule != "" {
			return refuse("line %d is GBNF (%s). Grammars are read in Lark's syntax: rules are written with a colon (start: item+), "+
				"the first one is named start, names of rules are lower case and of terminals upper case, and regular expressions stand between slashes (NUMBER: /[0-9]+/)", line, rule)
		}
		if err := cost.lark(text); err != nil {
			return refuse("%v", err)
		}
	}
	cost.multiples()
	if cost.total > maxCost {
		return refuse("the constraint is too complex: %s, and its estimated cost is %d times what is allowed", cost.dearest(), 1+cost.total/maxCost)
	}
	return nil
}

// withOptions states how a schema is compiled, in the library's own keyword: white space between JSON's tokens is
// allowed, as in the library's default, but no more than an indented document needs, so that a model cannot write blanks
// without end.
func withOptions(schema string) string {
	rest := strings.TrimLeft(schema, " \t\r\n")[1:] // Check has seen the brace
	comma := ","
	if strings.HasPrefix(strings.TrimLeft(rest, " \t\r\n"), "}") {
		comma = ""
	}
	return `{"x-guidance":{"whitespace_pattern":"[ \\t\\r\\n]{1,40}"}` + comma + rest
}

// cost is the estimated time of compiling a grammar, in microseconds, by what it is for.
type cost struct {
	total    int
	parts    map[string]int
	divisors map[string]*big.Rat // of all multipleOf
}

func (c *cost) add(what string, n int) {
	if n < 0 || n > 1<<40 {
		n = 1 << 40
	}
	if c.parts == nil {
		c.parts = map[string]int{}
	}
	c.parts[what] += n
	c.total += n
	c.total = min(c.total, 1<<50)
}

// dearest says what costs most.
func (c *cost) dearest() string {
	best := ""
	for what, n := range c.parts {
		if best == "" || n > c.parts[best] || n == c.parts[best] && what < best {
			best = what
		}
	}
	return "most of it is for " + best
}

// decodeSchema reads a text that is one JSON value of bounded depth.
func decodeSchema(text string) (any, error) {
	v, n, err := decodePrefix(text)
	if err == nil && strings.Trim(text[n:], " \t\r\n") != "" {
		err = errors.New("the schema is followed by other text")
	}
	return v, err
}

// decodePrefix reads the JSON value of bounded depth that a text begins with, and returns its length.
func decodePrefix(text string) (v any, length int, err error) {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if v, err = decodeValue(d, 0); err != nil {
		return nil, 0, fmt.Errorf("the schema is no JSON: %w", err)
	}
	return v, int(d.InputOffset()), nil
}

func decodeValue(d *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("it is nested deeper than %d levels", maxDepth)
	}
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch token {
	case json.Delim('{'):
		object := map[string]any{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, err
			}
			v, err := decodeValue(d, depth+1)
			if err != nil {
				return nil, err
			}
			name, ok := key.(string)
			if !ok {
				return nil, fmt.Errorf("a key is no string")
			}
			object[name] = v
		}
		_, err = d.Token()
		return object, err
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := decodeValue(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = d.Token()
		return list, err
	}
	return token, nil
}

// schema adds the cost of a JSON schema. Keywords are counted wherever they stand, also as names of properties.
func (c *cost) schema(v any) {
	switch v := v.(type) {
	case []any:
		c.add("values", 3*len(v))
		for _, item := range v {
			c.schema(item)
		}
	case string:
		c.add("texts", 1+len(v)/16)
	case map[string]any:
		c.add("values", 5*len(v))
		for key, value := range v {
			c.add("texts", len(key)/16)
			c.keyword(key, value)
			c.schema(value)
		}
	}
}

// keyword adds what a keyword costs beyond its parts.
func (c *cost) keyword(key string, value any) {
	members, _ := value.(map[string]any)
	items, _ := value.([]any)
	number, _ := value.(json.Number)
	text, _ := value.(string)
	n := len(members) + len(items)
	switch key {
	case "properties":
		c.add(key, 15*n+n*n/18)
	case "patternProperties": // each is compared with each
		c.add(key, 50*n+6*n*n)
		for pattern := range members {
			c.regex(pattern)
		}
	case "anyOf", "oneOf", "allOf":
		c.add(key, 20*n+n*n/5)
	case "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum":
		if number != "" {
			c.add(key, 180)
		}
	case "minItems", "maxItems":
		if number != "" {
			c.add(key, 220)
		}
	case "minLength", "maxLength", "minProperties", "maxProperties":
		if number != "" {
			c.add(key, 30)
		}
	case "format":
		if text != "" {
			c.add(key, 220)
		}
	case "$ref":
		if text != "" {
			c.add(key, 30)
		}
	case "pattern", "whitespace_pattern":
		c.regex(text)
	case "multipleOf":
		if number == "" {
			return
		}
		if e := strings.IndexAny(string(number), "eE"); e >= 0 && len(number)-e > 5 {
			c.add(key, 1<<40) // nothing is a multiple of it
			return
		}
		if divisor, ok := new(big.Rat).SetString(string(number)); ok && divisor.Sign() != 0 {
			if c.divisors == nil {
				c.divisors = map[string]*big.Rat{}
			}
			c.divisors[divisor.RatString()] = divisor.Abs(divisor)
		}
	}
}

// multiples adds the cost of all multipleOf: a state for each remainder of each, and, where schemas are merged, of their
// least common multiple.
func (c *cost) multiples() {
	const each = 4
	scale := big.NewInt(1) // makes all of them integers
	for _, r := range c.divisors {
		scale = leastCommonMultiple(scale, r.Denom())
	}
	together := big.NewInt(1)
	for _, r := range c.divisors {
		n := new(big.Int).Mul(r.Num(), new(big.Int).Div(scale, r.Denom()))
		together = leastCommonMultiple(together, n)
		c.add("multipleOf", each*bounded(decimal(r)))
		if together.BitLen() > 64 {
			break
		}
	}
	if len(c.divisors) > 1 {
		c.add("multipleOf", each*bounded(together))
	}
}

// decimal returns the digits of a decimal fraction without its point: 25 for 0.25.
func decimal(r *big.Rat) *big.Int {
	n, ten := new(big.Rat).Set(r), big.NewRat(10, 1)
	for range 400 {
		if n.IsInt() {
			break
		}
		n.Mul(n, ten)
	}
	return n.Num()
}

func leastCommonMultiple(a, b *big.Int) *big.Int {
	gcd := new(big.Int).GCD(nil, nil, a, b)
	return new(big.Int).Mul(a, new(big.Int).Div(b, gcd))
}

// bounded returns n, at most a billion.
func bounded(n *big.Int) int {
	if n.BitLen() > 30 {
		return 1 << 30
	}
	return int(n.Int64())
}

var (
	ignoresCase = regexp.MustCompile(`\(\?[a-zA-Z-]*i|/[a-z]*i`)
	wideRange   = regexp.MustCompile(`-\\|-[^\x00-\x7f]`)
	category    = regexp.MustCompile(`\\[pP]`)
	class       = regexp.MustCompile(`\\[wWdDsS]`)
	jsonKeyword = regexp.MustCompile(`%(?:json|llguidance|regex)\b`)
	ruleOfGBNF  = regexp.MustCompile(`(?m)^[ \t]*([A-Za-z0-9_-]+[ \t]*::=)`)
)

// regex adds the cost of a regular expression, or of a text that holds some. What counted repetitions unfold to is
// bounded by the library itself.
func (c *cost) regex(text string) {
	n := len(text)/2 + 20*len(class.FindAllStringIndex(text, -1))
	categories := len(category.FindAllStringIndex(text, -1))
	if ignoresCase.MatchString(text) {
		// Every character of a range is folded, one after the other.
		n += 150*categories + 5000*len(wideRange.FindAllStringIndex(text, -1)) + 10*strings.Count(text, "[")
	} else {
		n += 15 * categories
	}
	c.add("regular expressions", n)
}

// lark adds the cost of a Lark grammar.
func (c *cost) lark(text string) error {
	c.add("rules", 60*strings.Count(text, "\n")+5*strings.Count(text, "|"))
	rest := 0
	end := 0 // of the last schema: what stands in schemas is counted as theirs, not as regular expressions
	for _, at := range jsonKeyword.FindAllStringIndex(text, -1) {
		schema, length, err := decodePrefix(text[at[1]:])
		if err != nil {
			return fmt.Errorf("%s at offset %d: %w", text[at[0]:at[1]], at[0], err)
		}
		c.schema(schema)
		if at[0] >= end {
			c.regex(text[end:at[0]])
			rest += at[0] - end
			end = at[1] + length
		}
	}
	c.regex(text[end:])
	if rest += len(text) - end; rest > maxLark {
		return fmt.Errorf("the text has %d bytes without the schemas in it, at most %d are allowed", rest, maxLark)
	}
	return nil
}

// gbnf returns the first rule of a grammar in the syntax of llama.cpp and the line it is on, "" if there is none.
func gbnf(text string) (line int, rule string) {
	at := ruleOfGBNF.FindStringSubmatchIndex(text)
	if at == nil {
		return 0, ""
	}
	return 1 + strings.Count(text[:at[2]], "\n"), text[at[2]:at[3]]
}
