// Package engine holds the plain types of compute that the engines (llama, graph) and their users (runner, train,
// prompt) share. It imports no cgo.
package engine

import "fmt"

// Token is a token id of a model's vocabulary, in [0, vocabulary size).
type Token int32

// Error is a failed call into an engine: Op names the call, Code is the engine's own result code.
type Error struct {
	Op   string
	Code int
}

func (e *Error) Error() string { return fmt.Sprintf("%s returned %d", e.Op, e.Code) }
