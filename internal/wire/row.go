package wire

// RowKind is a kind of rows of a training file, as messages show it; "" is none that is known. All rows of a file are of
// one kind.
type RowKind string

// The kinds of rows. Those with two answers are of jobs whose method is dpo.
const (
	ChatRows           RowKind = `{"messages": [...]}`
	CompletionRows     RowKind = `{"prompt": "...", "completion": "..."}`
	ChatCompletionRows RowKind = `{"prompt": [messages], "completion": [messages]}`
	TextRows           RowKind = `{"text": "..."}`
	OutputPairs        RowKind = `{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}` // OpenAI's
	TextPairs          RowKind = `{"prompt": "...", "chosen": "...", "rejected": "..."}`                                    // TRL's, as the next
	ChatPairs          RowKind = `{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`
)

// Pairs reports whether each row has two answers, the preferred one and the other.
func (k RowKind) Pairs() bool { return k == OutputPairs || k == TextPairs || k == ChatPairs }
