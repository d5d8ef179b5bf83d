package engine

import "errors"

// Errors of Decoder.Decode after which the decoder goes on.
var (
	// ErrNoRoom says that the cache has no free cells for the batch; nothing was computed and the cache is as before.
	ErrNoRoom = errors.New("no room in the key-value cache")
	// ErrAborted says that Abort was called. What the batch's sequences hold beyond their Position is undefined: Truncate them.
	ErrAborted = errors.New("the computation was aborted")
)

// Sequence is a number in [0, Limits.Sequences) under which a Decoder keeps the keys and values of consecutive tokens
// from position 0 on.
type Sequence int32

// Decoder computes batches of tokens of several sequences for serving: graph.Server for the architectures that can be
// trained, llama.Decoder for all others. One goroutine at a time may use it, but for Abort and LoadAdapter.
type Decoder interface {
	Limits() Limits
	// LoadAdapter reads an adapter.gguf that fits the base model. Any goroutine may call it, also during Decode.
	LoadAdapter(path string) (Adapter, error)
	// Share lets the empty sequence `to` hold the first n tokens of `from`, n at most what from holds; nothing is computed
	// and the cells are shared until one of the two is extended or truncated. False: only whole sequences can be shared here,
	// and nothing was done.
	Share(from, to Sequence, n int) bool
	// Truncate keeps the first n tokens of a sequence. False: it could not, and the sequence is empty now.
	Truncate(s Sequence, n int) bool
	// FreeTokens is how many more tokens the cache has cells for, at least.
	FreeTokens() int
	// Decode appends each part's tokens to its sequence and computes their logits. It returns ErrNoRoom, ErrAborted, or
	// another error after which the sequences of the batch must be truncated.
	Decode(parts []Part) error
	// Output returns what Decode computed for the i-th wanted token of a part: logits [vocabulary], or with WantState the
	// last hidden state after the final norm [embedding]. It is valid until the next Decode and must not be changed.
	Output(part, i int) []float32
	// Abort makes a running Decode return ErrAborted soon, and later ones until ResetAbort. Any goroutine may call it.
	Abort()
	ResetAbort()
	Close()
}

// Limits of a decoder.
type Limits struct {
	Sequences     int  // sequence numbers
	CacheTokens   int  // cells of the cache, all sequences together
	BatchTokens   int  // most tokens of one Decode
	Vocabulary    int  // logits of a token
	Embedding     int  // elements of a hidden state
	MixedAdapters bool // the parts of one batch may have different adapters
}

// Adapter is a loaded LoRA adapter. Close frees it when no part of a running Decode has it.
type Adapter interface {
	Bytes() int // memory
	Close()
}

// Want says which tokens of a part have an Output.
type Want int

// Kinds of Want.
const (
	WantNone  Want = iota // the prompt goes on
	WantLast              // logits of the part's last token: Output(part, 0)
	WantAll               // logits of every token
	WantState             // the hidden state of every token, for embeddings
)

// Part is consecutive tokens of one sequence in a batch; a sequence has at most one part in a batch.
type Part struct {
	Sequence Sequence
	Position int     // of Tokens[0]: what the sequence holds already
	Tokens   []Token // at least one
	Adapter  Adapter // nil: the base model
	Want     Want
}
