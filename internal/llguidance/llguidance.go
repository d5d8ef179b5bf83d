// Package llguidance constrains what a model may say: after each token it computes which tokens can come next.
// It owns the only cgo of llguidance, a Rust library with a C API (llguidance.h, version 1.9.1, is that crate's own
// header; its licence is in LICENSE). The library is in libtokenizers.a, which scripts/native.sh builds.
//
//	tokenizer, err := llguidance.NewTokenizer(pieces, special, endOfTurn) // once for a model
//	constraint, err := tokenizer.Choices([]string{"A", "B", "C", "D"})    // once for a completion
//	defer constraint.Close()
//	for !constraint.Stopped() {
//		mask, err := constraint.Mask()   // bit t is 1 where token t may come next
//		token := pick(logits, mask)
//		err = constraint.Accept(token)
//	}
package llguidance

/*
#cgo LDFLAGS: -ltokenizers -ldl -lm -lstdc++ -lpthread
#include <pthread.h>
#include <string.h>
#include <time.h>
#include "llguidance.h"

static LlgTokenizer *hone_new_tokenizer(uint32_t vocab, uint32_t eos, const uint32_t *lens, const uint8_t *bytes,
                                        char *err, size_t err_len) {
	LlgTokenizerInitV2 init;
	memset(&init, 0, sizeof init);
	init.struct_size = sizeof init;
	init.vocab_size = vocab;
	init.tok_eos = eos;
	init.token_lens = lens;
	init.token_bytes = bytes;
	init.use_approximate_greedy_tokenize_fn = true;
	return llg_new_tokenizer_v2(&init, err, err_len);
}

// A grammar is compiled by recursion over its rules, which a long chain of rules takes deeper than a thread's usual
// stack. Only the pages that are touched are ever memory.
enum { hone_compile_stack = 256 << 20 };

struct hone_compile {
	const LlgTokenizer *tokenizer;
	const char *kind, *text;
	LlgMatcher *matcher;
	int64_t cpu_ns;
};

static void *hone_compile(void *p) {
	struct hone_compile *job = p;
	LlgConstraintInit init;
	memset(&init, 0, sizeof init);
	llg_constraint_init_set_defaults(&init, job->tokenizer);
	init.log_stderr_level = 0;
	init.limits.verbose_errors = false;
	init.limits.initial_lexer_fuel = 500000; // half the default: about 50 ms at most
	init.limits.max_grammar_size = 200000;   // default 500000
	init.limits.max_lexer_states = 25000;    // of 1 to 2 kB each; default 250000
	job->matcher = llg_new_matcher(&init, job->kind, job->text);
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	job->cpu_ns = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
	return NULL;
}

// hone_new_matcher compiles in a thread of its own; NULL if there can be none. *cpu_ns is what it took.
static LlgMatcher *hone_new_matcher(const LlgTokenizer *tokenizer, const char *kind, const char *text, int64_t *cpu_ns) {
	struct hone_compile job = {tokenizer, kind, text, NULL, 0};
	pthread_attr_t attr;
	pthread_t thread;
	if (pthread_attr_init(&attr) != 0) return NULL;
	int failed = pthread_attr_setstacksize(&attr, hone_compile_stack) != 0 || pthread_create(&thread, &attr, hone_compile, &job) != 0;
	pthread_attr_destroy(&attr);
	if (failed) return NULL;
	pthread_join(thread, NULL);
	*cpu_ns = job.cpu_ns;
	return job.matcher;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
	"unsafe"

	"github.com/hone-llm/hone/internal/engine"
)

// ErrClosed is returned by methods of a closed Tokenizer or Constraint.
var ErrClosed = errors.New("llguidance: use after Close")

// Kinds of grammar that Tokenizer.New accepts, in the library's own words.
const (
	KindRegex      = "regex"       // a regular expression in the syntax of Rust's regex crate
	KindJSONSchema = "json_schema" // a JSON schema
	KindJSONObject = "json_object" // any JSON object; the text is ignored
	KindLark       = "lark"        // a grammar in llguidance's variant of Lark
)

// GrammarError is a grammar that the library refuses: it cannot be parsed, names something unknown or is too large.
// The request that carries it is at fault.
type GrammarError struct {
	Kind    string
	Message string        // what is wrong with it
	Took    time.Duration // processor time that the library spent on it
}

func (e *GrammarError) Error() string {
	return fmt.Sprintf("invalid %s constraint: %s", e.Kind, e.Message)
}

// Tokenizer is a vocabulary as constraints see it: the bytes of every token. Goroutines may share it.
type Tokenizer struct {
	mu         sync.RWMutex // held for writing only by Close
	c          *C.LlgTokenizer
	vocabulary int
}

// NewTokenizer hands a model's vocabulary to the library, which keeps its own copy.
//
//	pieces   [V]  the bytes of every token; an empty piece is never allowed
//	special  [V]  true for control tokens (<|im_end|>, unused ones): their text never matches a constraint's text
//	eos           the token that ends a turn, allowed where the constraint is complete
//
// Where several tokens have equal bytes, only the one with the highest id is used: in SentencePiece vocabularies the
// low ids are the byte fallbacks (<0x41>), which a tokenizer does not produce for text that has a token of its own.
//
// Any sequence of tokens that spells an allowed text is allowed, also one that the model's tokenizer would not
// produce: the library's forced tokens, which would need the tokenizer itself, are not used.
func NewTokenizer(pieces [][]byte, special []bool, eos engine.Token) (*Tokenizer, error) {
	if len(pieces) == 0 || len(special) != len(pieces) {
		return nil, fmt.Errorf("llguidance: %d pieces and %d special flags: both must be the vocabulary's size", len(pieces), len(special))
	}
	if eos < 0 || int(eos) >= len(pieces) {
		return nil, fmt.Errorf("llguidance: end-of-turn token %d is outside the vocabulary of %d tokens", eos, len(pieces))
	}
	last := make(map[string]int, len(pieces))
	total := 0
	for t, piece := range pieces {
		if !special[t] {
			last[string(piece)] = t
		}
		total += len(piece) + 1
	}
	lens := make([]C.uint32_t, len(pieces))
	text := make([]byte, 0, total)
	for t, piece := range pieces {
		switch {
		case len(piece) == 0:
		case special[t]:
			// The byte 0xFF, which no UTF-8 text holds, marks special tokens for the library.
			text = append(append(text, 0xff), piece...)
			lens[t] = C.uint32_t(len(piece) + 1)
		case last[string(piece)] == t:
			text = append(text, piece...)
			lens[t] = C.uint32_t(len(piece))
		}
	}
	if len(text) == 0 {
		return nil, errors.New("llguidance: every piece of the vocabulary is empty")
	}
	message := make([]byte, 512)
	c := C.hone_new_tokenizer(C.uint32_t(len(pieces)), C.uint32_t(eos), &lens[0], (*C.uint8_t)(&text[0]),
		(*C.char)(unsafe.Pointer(&message[0])), C.size_t(len(message)))
	if c == nil {
		return nil, fmt.Errorf("llguidance: vocabulary: %s", C.GoString((*C.char)(unsafe.Pointer(&message[0]))))
	}
	t := &Tokenizer{c: c, vocabulary: len(pieces)}
	runtime.SetFinalizer(t, (*Tokenizer).Close)
	return t, nil
}

// Close frees the vocabulary. Constraints made from it stay valid. It may be called more than once.
func (t *Tokenizer) Close() error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.c != nil {
		C.llg_free_tokenizer(t.c)
		t.c = nil
		runtime.SetFinalizer(t, nil)
	}
	return nil
}

// Choices returns a constraint that allows exactly one of the given texts, followed by the end of the turn. A choice
// may be the beginning of another. The error is a *GrammarError where a choice is empty, repeated or not UTF-8.
func (t *Tokenizer) Choices(choices []string) (*Constraint, error) {
	if len(choices) == 0 {
		return nil, &GrammarError{Kind: "choice", Message: "there are no choices"}
	}
	seen := make(map[string]int, len(choices))
	total := 0
	var grammar strings.Builder
	grammar.WriteString("start: ")
	for i, choice := range choices {
		if choice == "" {
			return nil, &GrammarError{Kind: "choice", Message: fmt.Sprintf("choice %d is empty", i)}
		}
		if !utf8.ValidString(choice) {
			return nil, &GrammarError{Kind: "choice", Message: fmt.Sprintf("choice %d is not valid UTF-8", i)}
		}
		if first, ok := seen[choice]; ok {
			return nil, &GrammarError{Kind: "choice", Message: fmt.Sprintf("choices %d and %d are the same: %q", first, i, choice)}
		}
		seen[choice] = i
		if total += len(choice); total > maxChoiceText {
			return nil, &GrammarError{Kind: "choice", Message: fmt.Sprintf("the choices have more than %d bytes together", maxChoiceText)}
		}
		if i > 0 {
			grammar.WriteString(" | ")
		}
		writeLarkString(&grammar, choice)
	}
	return t.compile(KindLark, grammar.String())
}

// writeLarkString writes text as a Lark string, which takes JSON's escapes but, unlike JSON, no control character.
func writeLarkString(w *strings.Builder, text string) {
	w.WriteByte('"')
	for _, r := range text {
		if r == '"' || r == '\\' || unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			fmt.Fprintf(w, `\u%04x`, r)
		} else {
			w.WriteRune(r)
		}
	}
	w.WriteByte('"')
}

// New returns a constraint from a grammar: kind is one of the Kind constants, text is in that kind's syntax.
// The error is a *GrammarError where the grammar is at fault, or would take too long to compile (see Check, which New
// calls): compiling cannot be interrupted.
func (t *Tokenizer) New(kind, text string) (*Constraint, error) {
	if err := Check(kind, text); err != nil {
		return nil, err
	}
	if kind == KindJSONObject {
		kind, text = KindJSONSchema, `{"type":"object"}`
	}
	if kind == KindJSONSchema {
		text = withOptions(text)
	}
	return t.compile(kind, text)
}

func (t *Tokenizer) compile(kind, text string) (*Constraint, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.c == nil {
		return nil, ErrClosed
	}
	cKind := C.CString(kind)
	defer C.free(unsafe.Pointer(cKind))
	cText := C.CString(text)
	defer C.free(unsafe.Pointer(cText))
	var cpu C.int64_t
	matcher := C.hone_new_matcher(t.c, cKind, cText, &cpu)
	if matcher == nil {
		return nil, errors.New("llguidance: no thread to compile the grammar in: out of memory or threads")
	}
	if message := C.llg_matcher_get_error(matcher); message != nil {
		err := &GrammarError{Kind: kind, Message: explain(C.GoString(message)), Took: time.Duration(cpu)}
		C.llg_free_matcher(matcher)
		return nil, err
	}
	return newConstraint(matcher, t.vocabulary, time.Duration(cpu)), nil
}

func newConstraint(matcher *C.LlgMatcher, vocabulary int, compiled time.Duration) *Constraint {
	c := &Constraint{c: matcher, vocabulary: vocabulary, compiled: compiled}
	c.mask = make([]uint32, int(C.llg_matcher_get_mask_byte_size(matcher))/4)
	runtime.SetFinalizer(c, (*Constraint).Close)
	return c
}

// explain makes a message of the library one for a client: without the library's markers, and not longer than a
// message should be, where the library quotes whole grammars.
func explain(message string) string {
	message, _, _ = strings.Cut(message, "\n<state>")
	message, _, _ = strings.Cut(message, "\n<backtrace>")
	message = strings.TrimSpace(strings.ReplaceAll(message, "<non-verbose/>", ""))
	const most = 600
	if len(message) > most {
		message = strings.ToValidUTF8(message[:most], "") + " ..."
	}
	for _, known := range []struct{ contains, say string }{
		{"NoExtensionBias", "no text satisfies the constraint from here on"},
		{"oneOf constraints are not supported", "oneOf is enforced only where its alternatives exclude each other by a const, an enum or a type; use anyOf"},
	} {
		if strings.Contains(message, known.contains) {
			return known.say
		}
	}
	return message
}

// Constraint is the state of one completion under a grammar. It is not safe for concurrent use.
type Constraint struct {
	c          *C.LlgMatcher
	vocabulary int
	compiled   time.Duration
	mask       []uint32
}

// Compiled is the processor time that compiling the grammar took.
func (c *Constraint) Compiled() time.Duration { return c.compiled }

// Clone returns an independent constraint in the same state, for a fraction of what compiling takes.
// C: llg_clone_matcher.
func (c *Constraint) Clone() (*Constraint, error) {
	if c.c == nil {
		return nil, ErrClosed
	}
	return newConstraint(C.llg_clone_matcher(c.c), c.vocabulary, 0), nil
}

// Close frees the constraint. It may be called more than once.
func (c *Constraint) Close() error {
	if c == nil || c.c == nil {
		return nil
	}
	C.llg_free_matcher(c.c)
	c.c = nil
	runtime.SetFinalizer(c, nil)
	return nil
}

// Mask returns the tokens that may come next: token t is allowed if mask[t/32]>>(t%32)&1 is 1. Once the constraint is
// stopped, that is the end-of-turn token only. The slice is overwritten by the next call.
// C: llg_matcher_compute_mask_into.
func (c *Constraint) Mask() ([]uint32, error) {
	if c.c == nil {
		return nil, ErrClosed
	}
	if C.llg_matcher_compute_mask_into(c.c, (*C.uint32_t)(&c.mask[0]), C.size_t(4*len(c.mask))) != 0 {
		return nil, c.err("next tokens")
	}
	return c.mask, nil
}

// Accept advances the constraint by the token that was chosen; a token that Mask does not allow is an error, after
// which the constraint is of no further use. C: llg_matcher_consume_token.
func (c *Constraint) Accept(token engine.Token) error {
	if c.c == nil {
		return ErrClosed
	}
	if token < 0 || int(token) >= c.vocabulary {
		return fmt.Errorf("llguidance: token %d is outside the vocabulary of %d tokens", token, c.vocabulary)
	}
	if C.llg_matcher_consume_token(c.c, C.uint32_t(token)) != 0 {
		return c.err(fmt.Sprintf("token %d", token))
	}
	return nil
}

// Stopped reports that nothing but the end of the turn can follow, or that it has come. C: llg_matcher_is_stopped.
func (c *Constraint) Stopped() bool { return c.c == nil || bool(C.llg_matcher_is_stopped(c.c)) }

// Complete reports that the text so far satisfies the constraint, though more may be allowed to follow.
// C: llg_matcher_is_accepting.
func (c *Constraint) Complete() bool { return c.c != nil && bool(C.llg_matcher_is_accepting(c.c)) }

func (c *Constraint) err(what string) error {
	message := "unknown error"
	if m := C.llg_matcher_get_error(c.c); m != nil {
		message = explain(C.GoString(m))
	}
	return fmt.Errorf("%s: %s", what, message)
}

// Allowed reports whether a mask allows the token.
func Allowed(mask []uint32, token engine.Token) bool {
	return token >= 0 && int(token)/32 < len(mask) && mask[token/32]>>(token%32)&1 == 1
}
