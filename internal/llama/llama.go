// Package llama is the only cgo of llama.h: models, their vocabularies, contexts that decode batches of sequences, and
// LoRA adapters. The library comes out of the ollama module; api.h declares what is used of it.
//
//	llama.Open(llama.Options{Logger: logger})
//	model, err := llama.LoadModel("base.gguf", llama.ModelOptions{})
//	defer model.Close()
//	tokens, err := model.Tokenize("Hello", true, false)
//	context, err := llama.NewContext(model, llama.ContextOptions{Tokens: 4096, Sequences: 8})
//	defer context.Close()
//
// A failed assertion inside the library ends the process. So this package checks what it passes: sequence numbers,
// batch sizes, closed handles. Files must have been validated before (internal/gguf).
package llama

/*
#include "bridge.h"
*/
import "C"

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"unsafe"

	// The library itself. Not imported for its Go API, which searches other installations' directories for backends.
	_ "github.com/ollama/ollama/llama/llama.cpp/src"
	_ "github.com/ollama/ollama/ml/backend/ggml/ggml/src"
)

// ErrClosed is returned by methods of a model, context or adapter that was closed.
var ErrClosed = errors.New("llama: use after Close")

// Options of Open.
type Options struct {
	// Logger gets the library's messages, its information messages at debug level. nil discards them.
	Logger *slog.Logger
}

// library is the process-wide state of the C library: its log hook.
var library struct {
	sync.Mutex
	opened  bool
	logger  *slog.Logger
	partial strings.Builder // a message that has not ended with a newline yet
	level   slog.Level      // of partial
	errors  []string        // messages at error level since failure began, for the errors of LoadModel and the like
}

// Open initializes the library once in the process, before the first context is made, and sends its log to the logger; a later call replaces the logger.
func Open(o Options) {
	library.Lock()
	first := !library.opened
	library.opened = true
	library.logger = o.Logger
	library.Unlock()
	if first {
		// The library runs the last graph again when the next batch has the same shape, and does not notice that an
		// adapter was set or removed between the two. Building every graph costs less than 2% of a decode.
		_ = os.Setenv("LLAMA_GRAPH_REUSE_DISABLE", "1") // fails for malformed names only
		C.hone_log_hook()
		C.llama_backend_init()
	}
}

// Close stops logging. Models and contexts have Close methods of their own.
func Close() {
	library.Lock()
	library.logger = nil
	library.Unlock()
}

//export honeLlamaLog
func honeLlamaLog(level C.uint, text *C.char) {
	message := C.GoString(text)
	library.Lock()
	defer library.Unlock()
	switch level {
	case C.HONE_GGML_LOG_LEVEL_CONT: // goes on with the level of the message before
	case C.HONE_GGML_LOG_LEVEL_ERROR:
		library.level = slog.LevelError
	case C.HONE_GGML_LOG_LEVEL_WARN:
		library.level = slog.LevelWarn
	default:
		library.level = slog.LevelDebug
	}
	library.partial.WriteString(message)
	if !strings.HasSuffix(message, "\n") {
		return
	}
	line := strings.TrimSpace(library.partial.String())
	library.partial.Reset()
	if line == "" || strings.Trim(line, ".") == "" { // the progress dots of a loading model
		return
	}
	severity := severityOf(library.level, line)
	if severity == slog.LevelError {
		library.errors = append(library.errors, line)
		library.errors = library.errors[max(0, len(library.errors)-4):] // nobody may be reading them
	}
	if library.logger != nil {
		library.logger.Log(context.Background(), severity, "llama", "message", line)
	}
}

// severityOf returns the level that a message of the library is logged with: debug for those that nobody can or need act
// on.
//
//   - n_ctx_seq is larger, or smaller, than the context that the model was trained with. Where sequences share the cells,
//     n_ctx_seq is all of them, 16,384 in the runner, and does not say how long a sequence becomes. That is for the caller
//     to limit and to warn about.
//   - Graph reuse is disabled: by Open, on purpose.
//   - A computation ended with GGML_STATUS_ABORTED (1): by Abort, on purpose.
func severityOf(level slog.Level, line string) slog.Level {
	expected := strings.Contains(line, ": n_ctx_seq (") && strings.Contains(line, " n_ctx_train (") ||
		strings.HasSuffix(line, ": graph reuse disabled")
	aborted := strings.HasSuffix(line, "failed to compute graph, compute status: 1") ||
		strings.HasSuffix(line, "ggml_backend_sched_graph_compute_async failed with error 1")
	if level == slog.LevelWarn && expected || level == slog.LevelError && aborted {
		return slog.LevelDebug
	}
	return level
}

// failure runs a C call that reports its reason only in the log and returns that reason.
func failure(call func() bool) (ok bool, reason string) {
	library.Lock()
	library.errors = nil
	library.Unlock()
	if call() {
		return true, ""
	}
	library.Lock()
	defer library.Unlock()
	if len(library.errors) == 0 {
		return false, "no reason was logged"
	}
	return false, strings.Join(library.errors, "; ")
}

// cString returns a C copy of s and the function that frees it.
func cString(s string) (*C.char, func()) {
	c := C.CString(s)
	return c, func() { C.free(unsafe.Pointer(c)) }
}
