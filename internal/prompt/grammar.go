package prompt

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/third_party/jinja"
)

// toolGrammar returns the grammar of completions that may or must call tools, in llguidance's Lark: a tool's arguments
// are a %json sub-grammar of its schema, everything between is as the model's template writes it.
//
//	choice auto        any text, and calls; after the tag (or the beginning) of a call, a valid one
//	choice required    calls alone; a function's name, one call of it
//
// Reasoning is free text up to </think>: a tag in it calls nothing. Calls after the first follow each other at once.
// Llama's template knows one call an answer, so its grammar does too; an answer that begins with {"name" is a call.
func (b *Builder) toolGrammar(p *ChatPrompt, choice child.ToolChoice, parallel bool) (string, error) {
	g := &grammar{builder: b}
	tools := p.tools
	must := choice.Mode == child.ToolRequired
	if choice.Mode == child.ToolFunction {
		must, parallel = true, false
		tools = slices.DeleteFunc(slices.Clone(tools), func(t tool) bool { return t.name != choice.Name })
	}
	start := "answer"
	if !must {
		start = g.thinking(p.thinking) + "answer"
	}
	g.rule("start: " + start)
	var err error
	if p.form == llamaForm {
		err = g.llama(tools, must)
	} else {
		err = g.hermes(tools, must, parallel)
	}
	return g.text.String(), err
}

// grammar writes a Lark grammar.
type grammar struct {
	builder *Builder
	text    strings.Builder
	notText string // regular expression of what free text must not be; "" for none
}

func (g *grammar) rule(format string, args ...any) { fmt.Fprintf(&g.text, format+"\n", args...) }

// tag returns a tag as the grammar writes it: a control token by its id, since its name is no text for llguidance,
// any other as text.
func (g *grammar) tag(name string) (lark string, control bool) {
	v := g.builder.vocabulary
	parsed, err := v.Tokenize(name, false, true)
	if err == nil && len(parsed) == 1 {
		if plain, err := v.Tokenize(name, false, false); err == nil && !slices.Equal(plain, parsed) {
			return fmt.Sprintf("<[%d]>", parsed[0]), true
		}
	}
	return larkString(name), false
}

// until writes a rule of free text that ends with the first occurrence of a tag.
func (g *grammar) until(name, text, tag string) {
	if lark, control := g.tag(tag); control {
		g.rule("%s: %s %s", name, text, lark)
	} else {
		g.rule("%s[lazy]: %s %s", name, text, lark)
	}
}

// thinking writes the rule of the reasoning, and returns how the start refers to it.
func (g *grammar) thinking(state thinkState) string {
	switch state {
	case noThinking:
		return ""
	case openThinking:
		g.rule(`THOUGHT: /(.|\n)*/`)
		g.until("think", "THOUGHT", thinkEnd)
		return "think "
	case mayThink:
	}
	lark, control := g.tag(thinkStart)
	if control {
		g.rule(`THOUGHT: /(.|\n)*/`)
		g.until("thought", "THOUGHT", thinkEnd)
		g.rule(`think: /\s*/ %s thought`, lark)
	} else {
		g.notText = `\s*<think>(.|\n)*`
		g.rule(`THOUGHT: /\s*<think>(.|\n)*/`)
		g.until("think", "THOUGHT", thinkEnd)
	}
	return "think? "
}

// free writes the terminal TEXT: any text that does not look like something else.
func (g *grammar) free(not ...string) {
	if g.notText != "" {
		not = append(not, g.notText)
	}
	text := `/(.|\n)*/`
	for _, n := range not {
		text += " & ~/" + n + "/"
	}
	g.rule("TEXT: %s", text)
}

func (g *grammar) hermes(tools []tool, must, parallel bool) error {
	start, _ := g.tag(callStart)
	end, _ := g.tag(callEnd)
	more := ""
	if parallel {
		more = fmt.Sprintf(` ("\n" %s call)*`, start)
	}
	if must {
		g.rule("answer: %s call%s", start, more)
	} else {
		g.free()
		g.rule("answer: head call%s | TEXT", more)
		g.until("head", "TEXT", callStart)
	}
	g.rule(`call: "\n" function "\n" %s`, end)
	return g.functions(tools, `{"name": `, "arguments")
}

func (g *grammar) llama(tools []tool, must bool) error {
	tag, control := g.tag(pythonTag)
	if control {
		tag += "? "
	} else {
		tag = ""
	}
	if must {
		g.rule("answer: %sfunction", tag)
		return g.functions(tools, `{"name": `, "parameters")
	}
	g.free(`\s*\{\s*"name"(.|\n)*`)
	g.rule(`answer: %scall | TEXT`, tag)
	// However the model spaces the beginning of a call: once it looks like one, it is one.
	g.rule(`call: OPEN function`)
	g.rule(`OPEN: /\s*\{\s*"name"\s*:\s*/`)
	return g.functions(tools, "", "parameters")
}

// functions writes the rule of one call's object, from lead on.
func (g *grammar) functions(tools []tool, lead, arguments string) error {
	var alternatives []string
	for i, t := range tools {
		alternatives = append(alternatives, fmt.Sprintf(`%s arguments%d "}"`, larkString(lead+`"`+t.name+`", "`+arguments+`": `), i))
	}
	g.rule("function: %s", strings.Join(alternatives, " | "))
	for i, t := range tools {
		schema, err := argumentSchema(t)
		if err != nil {
			return &MessageError{Message: -1, Param: "tools", Err: fmt.Errorf("tools: parameters of %q: %w", t.name, err)}
		}
		g.rule("arguments%d: %%json %s", i, schema)
	}
	return nil
}

// Options of llguidance for arguments: JSON with the spaces that templates write and no other white space, which small
// models tend to write without end. Where the tool is not strict, keywords that llguidance does not know are ignored, as
// OpenAI's API does, and oneOf is read as anyOf.
const (
	strictOptions  = `{"whitespace_flexible":false,"item_separator":", ","key_separator":": "}`
	lenientOptions = `{"whitespace_flexible":false,"item_separator":", ","key_separator":": ","lenient":true}`
)

// argumentSchema returns the schema of a function's arguments: its parameters', of an object. Without parameters that
// is the empty object. Where the schema lists properties and says nothing about others, there are no others. Properties keep
// their order, which is that of the model's arguments; what only describes is left out.
func argumentSchema(t tool) (string, error) {
	parameters := t.parameters
	if len(parameters) == 0 {
		parameters = json.RawMessage(`{"properties": {}}`)
	}
	value, err := jinja.FromJSON(parameters)
	if err != nil || !value.IsDict() {
		return "", fmt.Errorf("expected a JSON schema of an object, not %.40q", parameters)
	}
	value = bareSchema(value)
	schema := value.AsDict()
	if kind, ok := schema.Get("type"); ok && (!kind.IsString() || kind.AsString() != "object") {
		return "", errors.New(`arguments are an object, so the schema's type must be "object"`)
	}
	if schema.Has("x-guidance") {
		return "", errors.New(`"x-guidance" is not a key of JSON schemas`)
	}
	schema.Set("type", jinja.NewString("object"))
	open := !schema.Has("properties")
	for _, key := range []string{"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if"} {
		open = open || schema.Has(key)
	}
	if !open {
		schema.Set("additionalProperties", jinja.NewBool(false))
	}
	options := lenientOptions
	if t.strict {
		options = strictOptions
	}
	text, err := jinja.ToJSON(value)
	if err != nil {
		return "", err
	}
	return `{"x-guidance": ` + options + ", " + text[1:], nil
}

// Keywords of JSON schemas whose values are schemas, lists of them or objects of them, and those that constrain nothing.
var (
	schemaKeys = []string{
		"items", "prefixItems", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "propertyNames", "contains",
		"not", "if", "then", "else", "allOf", "anyOf", "oneOf",
	}
	schemaMaps   = []string{"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
	descriptions = []string{"title", "description", "default", "example", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
)

// bareSchema returns a schema, or a list of them, without descriptions. These are for the prompt; in a grammar they count
// against its size.
func bareSchema(v jinja.Value) jinja.Value {
	switch {
	case v.IsList():
		items := make([]jinja.Value, 0, v.AsList().Len())
		for _, item := range v.AsList().Items {
			items = append(items, bareSchema(item))
		}
		return jinja.NewList(items)
	case v.IsDict():
		bare := jinja.NewDict()
		for _, key := range v.AsDict().OrderedKeys() {
			value, _ := v.AsDict().Get(key)
			switch {
			case slices.Contains(descriptions, key):
				continue
			case slices.Contains(schemaKeys, key):
				value = bareSchema(value)
			case slices.Contains(schemaMaps, key) && value.IsDict():
				named := jinja.NewDict()
				for _, name := range value.AsDict().OrderedKeys() {
					schema, _ := value.AsDict().Get(name)
					named.AsDict().Set(name, bareSchema(schema))
				}
				value = named
			}
			bare.AsDict().Set(key, value)
		}
		return bare
	}
	return v
}

// larkString writes text as a Lark string, which takes JSON's escapes but, unlike JSON, no control character.
func larkString(text string) string {
	var w strings.Builder
	w.WriteByte('"')
	for _, r := range text {
		if r == '"' || r == '\\' || unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			fmt.Fprintf(&w, `\u%04x`, r)
		} else {
			w.WriteRune(r)
		}
	}
	w.WriteByte('"')
	return w.String()
}
