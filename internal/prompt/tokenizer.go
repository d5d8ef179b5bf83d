package prompt

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/daulet/tokenizers"
	"github.com/hone-llm/hone/internal/engine"
)

const maxTokenizerBytes = 256 << 20

// hfTokenizer is a tokenizer.json, read by the library that wrote it. Goroutines may share it.
type hfTokenizer struct {
	mu sync.RWMutex // held for writing only by Close
	c  *tokenizers.Tokenizer

	digest [sha256.Size]byte // of the file as it is read
}

// probe has words, digits, space runs and two scripts: a tokenizer of another model does not spell it back.
const probe = "Hello, world! 12345  x\n\n\treturn 北京是首都。 Größe"

// openTokenizer reads a tokenizer.json and checks that it belongs to the vocabulary: that its tokens' pieces in the
// vocabulary spell the text that was tokenized.
func openTokenizer(path string, v Vocabulary) (*hfTokenizer, error) {
	data, err := readLimited(path, maxTokenizerBytes)
	if err != nil {
		return nil, fmt.Errorf("read tokenizer: %w", err)
	}
	var file map[string]json.RawMessage
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("tokenizer %s is not JSON: %w", path, err)
	}
	if len(file["model"]) == 0 {
		return nil, fmt.Errorf("tokenizer %s has no \"model\": it is no tokenizer.json of the tokenizers library", path)
	}
	// These are settings of whoever saved the file: they would silently cut or pad every prompt.
	file["truncation"], file["padding"] = json.RawMessage("null"), json.RawMessage("null")
	if data, err = json.Marshal(file); err != nil {
		return nil, fmt.Errorf("tokenizer %s: %w", path, err)
	}
	c, err := tokenizers.FromBytes(data)
	if err != nil {
		return nil, fmt.Errorf("tokenizer %s: %w", path, err)
	}
	t := &hfTokenizer{c: c, digest: sha256.Sum256(data)}
	if err := t.belongsTo(v); err != nil {
		t.Close()
		return nil, fmt.Errorf("tokenizer %s does not belong to the model: %w", path, err)
	}
	return t, nil
}

func (t *hfTokenizer) belongsTo(v Vocabulary) error {
	if size := int(t.c.VocabSize()); size > v.VocabularySize() {
		return fmt.Errorf("it has %d tokens, the model %d", size, v.VocabularySize())
	}
	tokens, err := t.Encode(probe)
	if err != nil {
		return err
	}
	var spelled strings.Builder
	for _, token := range tokens {
		spelled.Write(v.Piece(token))
	}
	// SentencePiece tokenizers put a space before a text.
	if strings.TrimPrefix(spelled.String(), " ") != probe {
		return fmt.Errorf("it makes tokens of %q that the model reads as %q", probe, spelled.String())
	}
	return nil
}

// Encode returns the tokens of text. Names of special tokens in it are read as these tokens; none are added.
func (t *hfTokenizer) Encode(text string) ([]engine.Token, error) {
	if text == "" {
		return nil, nil
	}
	// The library takes a C string.
	if i := strings.IndexByte(text, 0); i >= 0 {
		return nil, fmt.Errorf("NUL character at byte %d of the text", i)
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.c == nil {
		return nil, errors.New("the tokenizer is closed")
	}
	ids := t.c.EncodeWithOptions(strings.ToValidUTF8(text, "\uFFFD"), false).IDs
	if len(ids) == 0 {
		return nil, fmt.Errorf("tokenizer.json makes no tokens of a text of %d bytes", len(text))
	}
	tokens := make([]engine.Token, len(ids))
	for i, id := range ids {
		tokens[i] = engine.Token(id)
	}
	return tokens, nil
}

// Close frees the tokenizer; a nil one has nothing to free.
func (t *hfTokenizer) Close() error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.c == nil {
		return nil
	}
	err := t.c.Close()
	t.c = nil
	return err
}
