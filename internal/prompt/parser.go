package prompt

import (
	"crypto/rand"
	"encoding/json"
	"regexp"
	"strings"

	"github.com/hone-llm/hone/internal/child"
	"github.com/hone-llm/hone/third_party/jinja"
)

// Delta is what a part of a completion adds to the message: content, reasoning or a part of a call.
type Delta struct {
	Text      string
	Reasoning string
	ToolCalls []child.ToolCallDelta
}

// Parser takes a completion apart into content, reasoning and calls, as its text comes. It is not safe for concurrent use.
//
// Nothing is lost and nothing fails: what looks like a call and is none (no JSON, no name of a tool, cut off before its
// arguments) becomes content. Once a call's arguments have begun they go on as the model writes them, to the end of the
// object or of the completion. White space around reasoning, and between content and calls, is dropped.
// The deltas of a text, put together, do not depend on the parts that it comes in.
type Parser struct {
	form  toolForm
	names map[string]bool // of tools

	state   func(*Parser, bool) bool // a step; false: it needs more text. The argument says that none will come
	pending string                   // text that no step has taken yet
	out     []Delta
	begun   bool // reasoning: some was shown
	calls   int

	// Of the call that is being read.
	before  string // what stood before its object: white space, tag
	object  string // its text from '{' on
	scanned int    // bytes of object that the scanner has seen
	shown   int    // bytes of object that were shown as arguments
	depth   int    // open braces and brackets
	quoted  bool   // in a string
	escaped bool   // after a backslash
	started bool   // its name and a part of its arguments were shown
	done    bool   // its arguments are complete
}

func newParser(form toolForm, names map[string]bool, thinking thinkState) *Parser {
	p := &Parser{form: form, names: names}
	switch thinking {
	case openThinking:
		p.state = (*Parser).reasoning
	case mayThink:
		p.state = (*Parser).beforeReasoning
	case noThinking:
		p.state = p.answer()
	}
	return p
}

// Add appends a part of the completion's text, with the names of special tokens in it, and returns what it adds to the
// message. What may become a tag, or white space before one, is held back.
func (p *Parser) Add(text string) []Delta {
	p.pending += text
	return p.run(false)
}

// End returns what was held back. The completion is over.
func (p *Parser) End() []Delta { return p.run(true) }

// Called tells whether the completion has called a tool.
func (p *Parser) Called() bool { return p.calls > 0 }

func (p *Parser) run(end bool) []Delta {
	for p.state(p, end) {
	}
	out := p.out
	p.out = nil
	return out
}

// answer is the state in which what follows the reasoning begins.
func (p *Parser) answer() func(*Parser, bool) bool {
	switch p.form {
	case hermesForm:
		return (*Parser).content
	case llamaForm:
		return (*Parser).bareCall
	case unknownForm:
	}
	return (*Parser).rest
}

// last returns the delta to append to: the last one, unless it is of another kind.
func (p *Parser) last(same func(Delta) bool) *Delta {
	if n := len(p.out); n == 0 || !same(p.out[n-1]) {
		p.out = append(p.out, Delta{})
	}
	return &p.out[len(p.out)-1]
}

func (p *Parser) text(s string) {
	if s != "" {
		p.last(func(d Delta) bool { return d.Text != "" }).Text += s
	}
}

// take removes the first n bytes of pending.
func (p *Parser) take(n int) string {
	s := p.pending[:n]
	p.pending = p.pending[n:]
	return s
}

// rest shows all as content.
func (p *Parser) rest(bool) bool {
	p.text(p.take(len(p.pending)))
	return false
}

const space = " \t\r\n"

// beforeReasoning waits for <think>, which may stand at the beginning.
func (p *Parser) beforeReasoning(end bool) bool {
	text := strings.TrimLeft(p.pending, space)
	switch {
	case strings.HasPrefix(text, thinkStart):
		p.pending = text[len(thinkStart):]
		p.state = (*Parser).reasoning
	case strings.HasPrefix(thinkStart, text) && !end:
		return false
	default:
		p.state = p.answer()
	}
	return true
}

// reasoning shows what stands before </think>.
func (p *Parser) reasoning(end bool) bool {
	if !p.begun {
		p.pending = strings.TrimLeft(p.pending, space)
	}
	at := strings.Index(p.pending, thinkEnd)
	show := at
	if at < 0 {
		show = len(p.pending)
		if !end {
			show -= partial(p.pending, thinkEnd)
		}
	}
	show = len(strings.TrimRight(p.pending[:show], space))
	if show > 0 {
		p.begun = true
		p.last(func(d Delta) bool { return d.Reasoning != "" }).Reasoning += p.take(show)
	}
	if at < 0 {
		return false
	}
	p.take(at - show + len(thinkEnd))
	p.state = (*Parser).afterReasoning
	return true
}

// afterReasoning drops the newlines between reasoning and answer.
func (p *Parser) afterReasoning(end bool) bool {
	p.pending = strings.TrimLeft(p.pending, "\r\n")
	if p.pending == "" && !end {
		return false
	}
	p.state = p.answer()
	return true
}

// partial returns the length of the longest end of s that tag begins with, less than the whole tag.
func partial(s, tag string) int {
	for n := min(len(tag)-1, len(s)); n > 0; n-- {
		if strings.HasSuffix(s, tag[:n]) {
			return n
		}
	}
	return 0
}

// content shows text up to Hermes' tag, without the white space before it.
func (p *Parser) content(end bool) bool {
	at := strings.Index(p.pending, callStart)
	show := at
	if at < 0 {
		show = len(p.pending)
		if !end {
			show -= partial(p.pending, callStart)
		}
	}
	gap := show
	if at >= 0 || !end || p.calls > 0 {
		show = len(strings.TrimRight(p.pending[:show], space))
	}
	p.text(p.take(show))
	if at < 0 {
		return false
	}
	p.beginCall(p.take(gap - show + len(callStart)))
	return true
}

// bareCall looks for Llama's call, which is the whole answer: an object, perhaps after <|python_tag|>.
func (p *Parser) bareCall(end bool) bool {
	text := strings.TrimLeft(p.pending, space+";"[:min(1, p.calls)])
	object := text
	tagged := strings.HasPrefix(text, pythonTag)
	if tagged {
		object = strings.TrimLeft(text[len(pythonTag):], space)
	}
	switch {
	case strings.HasPrefix(object, "{"):
		p.beginCall(p.take(len(p.pending) - len(object)))
	case !end && (tagged || strings.HasPrefix(pythonTag, text)):
		return false // the Python form is read as a whole
	case tagged && p.pythonCall(object):
		p.pending = ""
		return false
	case end && text == "" && p.calls > 0:
		p.pending = ""
		return false
	default:
		p.state = (*Parser).rest
	}
	return true
}

var (
	pythonCall     = regexp.MustCompile(`^([a-zA-Z0-9_.-]+)\.call\((.*)\)\s*$`)
	pythonArgument = regexp.MustCompile(`^\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*("(?:[^"\\]|\\.)*"|[-+.\w]+)\s*(?:,|$)`)
)

// pythonCall reads the form that Llama has for built-in tools, name.call(key="value"), if the name is a tool's.
func (p *Parser) pythonCall(text string) bool {
	match := pythonCall.FindStringSubmatch(text)
	if match == nil || !p.names[match[1]] {
		return false
	}
	arguments := jinja.NewDict()
	for rest := strings.TrimSpace(match[2]); rest != ""; {
		argument := pythonArgument.FindStringSubmatch(rest)
		if argument == nil {
			return false
		}
		value := argument[2]
		switch value {
		case "True", "False":
			value = strings.ToLower(value)
		case "None":
			value = "null"
		}
		v, err := jinja.FromJSON([]byte(value))
		if err != nil {
			return false
		}
		arguments.AsDict().Set(argument[1], v)
		rest = rest[len(argument[0]):]
	}
	object, err := jinja.ToJSON(arguments)
	if err != nil {
		return false
	}
	p.start(match[1], object)
	p.calls++
	return true
}

func (p *Parser) beginCall(before string) {
	p.before, p.object = before, ""
	p.scanned, p.shown, p.depth = 0, 0, 0
	p.quoted, p.escaped, p.started, p.done = false, false, false, false
	p.state = (*Parser).call
}

// start shows the beginning of a call.
func (p *Parser) start(name, arguments string) {
	p.out = append(p.out, Delta{ToolCalls: []child.ToolCallDelta{
		{Index: p.calls, ID: "call_" + rand.Text()[:24], Name: name, Arguments: arguments},
	}})
}

// header matches a call up to the brace that begins its arguments.
var header = regexp.MustCompile(`^\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{`)

// firstKey matches an object up to its first key.
var firstKey = regexp.MustCompile(`^\{\s*"([^"]*)"`)

// call reads the object of a call. Its arguments are shown from the moment that its name and their beginning are there.
func (p *Parser) call(end bool) bool {
	if p.object == "" {
		text := strings.TrimLeft(p.pending, space)
		if text == "" && !end {
			return false
		}
		if !strings.HasPrefix(text, "{") {
			return p.noCall()
		}
		p.before += p.take(len(p.pending) - len(text))
	}
	p.object += p.take(len(p.pending))
	if !p.started {
		if match := header.FindStringSubmatchIndex(p.object); match != nil {
			name := ""
			if json.Unmarshal([]byte(p.object[match[2]:match[3]]), &name) != nil || !p.names[name] {
				return p.noCall()
			}
			p.started = true
			p.shown = match[1] - 1
			p.start(name, "")
		} else if !p.mayBeCall() {
			return p.noCall()
		}
	}
	closed, broken := p.scan()
	switch {
	case broken && p.done:
		p.calls++
		p.pending = p.object[p.shown:]
		p.state = p.answer()
		return true
	case broken && p.started:
		p.state = (*Parser).brokenCall
		p.pending = p.object[p.shown:]
		return true
	case broken:
		return p.noCall()
	case closed && !p.started && !p.wholeCall(p.object[:p.scanned]):
		return p.noCall()
	case closed:
		p.calls++
		p.pending = p.object[p.scanned:]
		p.state = (*Parser).afterCall
		return true
	case end && p.started:
		p.calls++ // cut off
		p.state = (*Parser).rest
		return false
	case end:
		return p.noCall()
	}
	return false
}

// mayBeCall tells whether an object that has no header may still be a call, by its first key: bare ones are held back
// for no other.
func (p *Parser) mayBeCall() bool {
	if p.form != llamaForm {
		return true
	}
	if match := firstKey.FindStringSubmatch(p.object); match != nil {
		switch match[1] {
		case "name", "type", "arguments", "parameters":
			return true
		}
		return false
	}
	after := strings.TrimLeft(p.object[1:], space)
	return after == "" || after[0] == '"'
}

// scan goes on through the object, and shows its arguments if the call has started. It stops where the object closes,
// scanned then being its length, and where a string holds a control character, which JSON does not allow.
func (p *Parser) scan() (closed, broken bool) {
	for ; p.scanned < len(p.object) && !closed && !broken; p.scanned++ {
		c := p.object[p.scanned]
		switch {
		case p.quoted && p.escaped:
			p.escaped = false
		case p.quoted && c == '\\':
			p.escaped = true
		case p.quoted && c < ' ':
			broken = true
			p.scanned-- // the loop's increment
		case c == '"':
			p.quoted = !p.quoted
		case p.quoted:
		case c == '{' || c == '[':
			p.depth++
		case c == '}' || c == ']':
			p.depth--
			closed = p.depth == 0
			if p.depth == 1 && p.started && !p.done {
				p.arguments(p.scanned + 1)
				p.done = true
			}
		}
	}
	if p.started && !p.done {
		p.arguments(p.scanned)
	}
	return closed, broken
}

// arguments shows the object's text up to end.
func (p *Parser) arguments(end int) {
	if end > p.shown {
		p.argumentText(p.object[p.shown:end])
		p.shown = end
	}
}

func (p *Parser) argumentText(s string) {
	if n := len(p.out); n > 0 && len(p.out[n-1].ToolCalls) > 0 {
		if call := &p.out[n-1].ToolCalls[0]; call.Index == p.calls {
			call.Arguments += s
			return
		}
	}
	p.out = append(p.out, Delta{ToolCalls: []child.ToolCallDelta{{Index: p.calls, Arguments: s}}})
}

// wholeCall shows a call whose keys come in another order, or whose arguments are a string of JSON.
func (p *Parser) wholeCall(object string) bool {
	var call struct {
		Name                  string
		Arguments, Parameters json.RawMessage
	}
	if json.Unmarshal([]byte(object), &call) != nil || !p.names[call.Name] {
		return false
	}
	arguments := call.Arguments
	if arguments == nil {
		arguments = call.Parameters
	}
	text := string(arguments)
	if strings.HasPrefix(text, `"`) && json.Unmarshal(arguments, &text) != nil {
		return false
	}
	if text == "" || text == "null" {
		text = "{}"
	}
	if !strings.HasPrefix(strings.TrimLeft(text, space), "{") || !json.Valid([]byte(text)) {
		return false
	}
	p.start(call.Name, text)
	return true
}

// noCall shows what was read as content, and goes on behind the tag: there may be another.
func (p *Parser) noCall() bool {
	p.text(p.before)
	p.pending = p.object + p.pending
	if p.form == llamaForm {
		p.state = (*Parser).rest
	} else {
		p.state = (*Parser).content
	}
	return true
}

// afterCall looks for the tag that ends a call, or the next of Llama's.
func (p *Parser) afterCall(end bool) bool {
	if p.form == llamaForm {
		p.state = (*Parser).bareCall
		return true
	}
	text := strings.TrimLeft(p.pending, space)
	switch {
	case strings.HasPrefix(text, callEnd):
		p.pending = text[len(callEnd):]
	case strings.HasPrefix(callEnd, text):
		if end {
			p.pending = "" // cut off in the tag
		}
		return false
	}
	p.state = (*Parser).content
	return true
}

// brokenCall shows the rest of arguments that are no JSON, up to the tag that ends the call.
func (p *Parser) brokenCall(end bool) bool {
	at := strings.Index(p.pending, callEnd)
	show := at
	if at < 0 || p.form == llamaForm {
		at, show = -1, len(p.pending)
		if !end {
			show -= partial(p.pending, callEnd)
		}
	}
	if at >= 0 || !end {
		show = len(strings.TrimRight(p.pending[:show], space))
	}
	if show > 0 {
		p.argumentText(p.take(show))
	}
	switch {
	case at >= 0:
		p.pending = strings.TrimLeft(p.pending, space)[len(callEnd):]
		p.calls++
		p.state = (*Parser).content
		return true
	case end:
		p.calls++
	}
	return false
}
