package llama

/*
#include "bridge.h"
*/
import "C"

import (
	"fmt"
	"math"
	"strconv"
	"unsafe"

	"github.com/hone-llm/hone/internal/engine"
)

// ModelOptions of LoadModel.
type ModelOptions struct {
	// VocabularyOnly loads metadata and vocabulary and no weights: enough to tokenize.
	VocabularyOnly bool
	// GPULayers is how many layers the GPUs whose backends are loaded compute (n_gpu_layers); AllLayers takes all, and
	// the head. 0 leaves the model to the CPU.
	GPULayers int
}

// AllLayers is more layers than a model has.
const AllLayers = 1 << 20

// Model is a loaded GGUF file: metadata, vocabulary and, unless VocabularyOnly, weights. Goroutines may share it;
// Close must come after every context, adapter and other call on it has ended.
type Model struct {
	c              *C.struct_llama_model
	vocab          *C.struct_llama_vocab
	size           int // vocabulary
	vocabularyOnly bool
}

// LoadModel maps the file into memory (llama_model_load_from_file). Weights that the CPU has faster kernels for in
// another layout are copied into it, the others are used as mapped. The error holds the library's own reason.
func LoadModel(path string, o ModelOptions) (*Model, error) {
	params := C.llama_model_default_params()
	params.vocab_only = C.bool(o.VocabularyOnly)
	params.n_gpu_layers = C.int32_t(o.GPULayers)
	m := &Model{vocabularyOnly: o.VocabularyOnly}
	name, free := cString(path)
	defer free()
	ok, reason := failure(func() bool {
		m.c = C.llama_model_load_from_file(name, params)
		return m.c != nil
	})
	if !ok {
		return nil, fmt.Errorf("load model %s: %s", path, reason)
	}
	m.vocab = C.llama_model_get_vocab(m.c)
	m.size = int(C.llama_vocab_n_tokens(m.vocab))
	if m.size == 0 {
		m.Close()
		return nil, fmt.Errorf("load model %s: it has no vocabulary", path)
	}
	return m, nil
}

// Close frees the model (llama_model_free). It may be called twice and on nil.
func (m *Model) Close() {
	if m == nil || m.c == nil {
		return
	}
	C.llama_model_free(m.c)
	m.c, m.vocab, m.size = nil, nil, 0
}

// Tokenize returns the tokens of text (llama_tokenize). addSpecial adds the tokens that the model wants around a text,
// usually BOS; parseSpecial reads the names of control tokens in text as these tokens and not as plain text.
// Bytes that are not UTF-8 are replaced by U+FFFD.
func (m *Model) Tokenize(text string, addSpecial, parseSpecial bool) ([]engine.Token, error) {
	if m.c == nil {
		return nil, ErrClosed
	}
	if len(text) > math.MaxInt32/2 {
		return nil, fmt.Errorf("tokenize: text of %d bytes is too long", len(text))
	}
	// A token is at least one byte but for the special ones around the text, and some tokenizers add a space.
	tokens := make([]engine.Token, len(text)/2+16)
	for {
		n := C.llama_tokenize(m.vocab, (*C.char)(unsafe.Pointer(unsafe.StringData(text))), C.int32_t(len(text)),
			(*C.int32_t)(unsafe.Pointer(&tokens[0])), C.int32_t(len(tokens)), C.bool(addSpecial), C.bool(parseSpecial))
		if n >= 0 {
			return tokens[:n:n], nil
		}
		if n == math.MinInt32 || int(-n) <= len(tokens) {
			return nil, &engine.Error{Op: "llama_tokenize", Code: int(n)}
		}
		tokens = make([]engine.Token, -n)
	}
}

// Piece returns the bytes that a token stands for (llama_token_to_piece): often a part of a word, sometimes a part of
// a UTF-8 character. A control token's piece is its name, such as <|im_end|>. A token outside of the vocabulary has none.
func (m *Model) Piece(token engine.Token) []byte {
	if !m.has(token) {
		return nil
	}
	var buffer [128]byte
	piece := buffer[:]
	for {
		n := C.llama_token_to_piece(m.vocab, C.int32_t(token), (*C.char)(unsafe.Pointer(&piece[0])), C.int32_t(len(piece)), 0, true)
		if n >= 0 {
			return append([]byte(nil), piece[:n]...)
		}
		piece = make([]byte, -n)
	}
}

// IsEndOfGeneration tells whether the model ends its turn with this token (llama_vocab_is_eog).
func (m *Model) IsEndOfGeneration(token engine.Token) bool {
	return m.has(token) && bool(C.llama_vocab_is_eog(m.vocab, C.int32_t(token)))
}

// IsControl tells whether the token is control, not text (llama_vocab_is_control).
func (m *Model) IsControl(token engine.Token) bool {
	return m.has(token) && bool(C.llama_vocab_is_control(m.vocab, C.int32_t(token)))
}

// BOS returns the token that begins a text and whether the vocabulary has one (llama_vocab_bos). Whether a prompt should
// begin with it is AddBOS.
func (m *Model) BOS() (engine.Token, bool) {
	if m.c == nil {
		return 0, false
	}
	t := engine.Token(C.llama_vocab_bos(m.vocab))
	return t, t != C.HONE_LLAMA_TOKEN_NULL
}

// EOS returns the token that ends a text and whether the vocabulary has one (llama_vocab_eos).
func (m *Model) EOS() (engine.Token, bool) {
	if m.c == nil {
		return 0, false
	}
	t := engine.Token(C.llama_vocab_eos(m.vocab))
	return t, t != C.HONE_LLAMA_TOKEN_NULL
}

// AddBOS tells whether Tokenize with addSpecial begins with BOS (llama_vocab_get_add_bos).
func (m *Model) AddBOS() bool { return m.c != nil && bool(C.llama_vocab_get_add_bos(m.vocab)) }

// VocabularySize is the number of tokens, and of logits a row (llama_vocab_n_tokens).
func (m *Model) VocabularySize() int { return m.size }

// EmbeddingSize is the number of elements of a hidden state (llama_model_n_embd).
func (m *Model) EmbeddingSize() int {
	if m.c == nil {
		return 0
	}
	return int(C.llama_model_n_embd(m.c))
}

// ChatTemplate returns the model's chat template, "" if it has none (llama_model_chat_template).
func (m *Model) ChatTemplate() string {
	if m.c == nil {
		return ""
	}
	return C.GoString(C.llama_model_chat_template(m.c, nil))
}

// TrainingContext is the context in tokens that the model was trained with (llama_model_n_ctx_train, which says 0 when
// only the vocabulary was loaded: then the file's metadata is read); 0 if the file does not say.
func (m *Model) TrainingContext() int {
	if m.c == nil {
		return 0
	}
	if n := int(C.llama_model_n_ctx_train(m.c)); n > 0 {
		return n
	}
	architecture, _ := m.Metadata("general.architecture")
	text, _ := m.Metadata(architecture + ".context_length")
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// Recurrent tells whether the model keeps a state instead of, or beside, a key-value cache: then a sequence can be
// neither cut nor copied in part (llama_model_is_recurrent, llama_model_is_hybrid).
func (m *Model) Recurrent() bool {
	return m.c != nil && (bool(C.llama_model_is_recurrent(m.c)) || bool(C.llama_model_is_hybrid(m.c)))
}

// WeightBytes is the size of all weights as stored (llama_model_size).
func (m *Model) WeightBytes() int64 {
	if m.c == nil {
		return 0
	}
	return int64(C.llama_model_size(m.c))
}

// Metadata returns a GGUF metadata value as text and whether the file has it; arrays are not reported
// (llama_model_meta_val_str).
func (m *Model) Metadata(key string) (string, bool) {
	if m.c == nil {
		return "", false
	}
	name, free := cString(key)
	defer free()
	n := C.llama_model_meta_val_str(m.c, name, nil, 0)
	if n < 0 {
		return "", false
	}
	value := make([]byte, n+1) // the call ends it with a NUL
	C.llama_model_meta_val_str(m.c, name, (*C.char)(unsafe.Pointer(&value[0])), C.size_t(len(value)))
	return string(value[:n]), true
}

func (m *Model) has(token engine.Token) bool {
	return m.c != nil && token >= 0 && int(token) < m.size
}
