package jinja

// This file is not part of the upstream package; see README.md.

import (
	"context"
	"fmt"
	"strings"
)

// Limits bound one render. A template is a program that came with a downloaded model, so every one of them is enforced.
type Limits struct {
	Steps  int // expressions and statements that are evaluated
	Bytes  int // length of the output and of any one string
	Memory int // bytes of all strings, lists and dicts that are built, whether or not they are still used
	Items  int // length of any one list
	Depth  int // nesting of expressions and macro calls, and of a value that is printed
}

// DefaultLimits leave room for long conversations: 1 MiB of text, thousands of messages.
var DefaultLimits = Limits{Steps: 5_000_000, Bytes: 1 << 20, Memory: 256 << 20, Items: 1 << 16, Depth: 500}

// LimitError says which of the Limits a render exceeded.
type LimitError struct{ What string }

func (e *LimitError) Error() string { return "template exceeds its limit of " + e.What }

// maxParseDepth bounds the nesting of expressions and blocks: the parser recurses.
const maxParseDepth = 500

// budget is what is left of the Limits; all evaluators of one render share it. Once it is exceeded it stays so, since
// some callers drop errors.
type budget struct {
	ctx    context.Context
	limits Limits
	steps  int
	memory int
	depth  int
	err    error
}

func newBudget(ctx context.Context, limits Limits) *budget {
	return &budget{ctx: ctx, limits: limits, steps: limits.Steps, memory: limits.Memory}
}

func (b *budget) fail(format string, args ...any) error {
	if b.err == nil {
		b.err = &LimitError{What: fmt.Sprintf(format, args...)}
	}
	return b.err
}

// step counts one expression or statement, and looks at the clock now and then.
func (b *budget) step() error {
	if b.err != nil {
		return b.err
	}
	if b.steps--; b.steps < 0 {
		return b.fail("%d steps", b.limits.Steps)
	}
	if b.steps%256 == 0 {
		if err := context.Cause(b.ctx); err != nil {
			b.err = err
			return err
		}
	}
	return nil
}

func (b *budget) enter() error {
	if b.depth++; b.depth > b.limits.Depth {
		return b.fail("%d nested expressions", b.limits.Depth)
	}
	return b.step()
}

func (b *budget) leave() { b.depth-- }

// built charges for a value that an expression made.
func (b *budget) built(v Value) error {
	if b.err != nil {
		return b.err
	}
	size := 0
	switch v.kind {
	case KindString:
		size = len(v.v.(string))
		if size > b.limits.Bytes {
			return b.fail("%d bytes in a string", b.limits.Bytes)
		}
	case KindList:
		n := v.v.(*List).Len()
		if n > b.limits.Items {
			return b.fail("%d items in a list", b.limits.Items)
		}
		size = 64 * n // a Value, what it points to, and what append grew it from
	case KindDict:
		size = 128 * v.v.(*Dict).Len()
	}
	if b.memory -= size + 32; b.memory < 0 {
		return b.fail("%d bytes of values", b.limits.Memory)
	}
	return nil
}

// =============================================================================

// Builtins do not see the budget, so each that can make much out of little keeps to these fixed bounds; passing one
// panics with a *LimitError, which Template.RenderLimited returns.
const (
	maxBuiltBytes = 4 << 20
	maxBuiltItems = 1 << 16
	maxPrintDepth = 200
	maxCompared   = 1 << 20
)

func checkBytes(n int) {
	if n < 0 || n > maxBuiltBytes {
		panic(&LimitError{What: fmt.Sprintf("%d bytes in a string", maxBuiltBytes)})
	}
}

func checkItems(n int) {
	if n < 0 || n > maxBuiltItems {
		panic(&LimitError{What: fmt.Sprintf("%d items in a list", maxBuiltItems)})
	}
}

func checkDepth(depth int) {
	if depth > maxPrintDepth {
		panic(&LimitError{What: fmt.Sprintf("%d nested lists and dicts", maxPrintDepth)})
	}
}

// repeatLimited is strings.Repeat; a negative count gives "", as in Python.
func repeatLimited(s string, count int64) string {
	if count <= 0 || s == "" {
		return ""
	}
	if count > maxBuiltBytes {
		checkBytes(-1)
	}
	checkBytes(len(s) * int(count))
	return strings.Repeat(s, int(count))
}

// replaceLimited is strings.Replace.
func replaceLimited(s, old, replacement string, count int) string {
	found := strings.Count(s, old)
	if count >= 0 && count < found {
		found = count
	}
	if len(replacement) > len(old) && len(replacement)-len(old) > maxBuiltBytes/max(found, 1) {
		checkBytes(-1)
	}
	checkBytes(len(s) + found*(len(replacement)-len(old)))
	return strings.Replace(s, old, replacement, count)
}

// splitLimited is strings.SplitN; n < 0 splits everywhere.
func splitLimited(s, sep string, n int) []string {
	if n < 0 {
		checkItems(strings.Count(s, sep) + 1)
	}
	return strings.SplitN(s, sep, n)
}
