package prompt_test

import (
	"compress/gzip"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/llama"
	"github.com/hone-llm/hone/internal/modeltest"
	"github.com/hone-llm/hone/internal/prompt"
	"github.com/hone-llm/hone/internal/wire"
)

// *llama.Model is the vocabulary of real models.
var _ prompt.Vocabulary = (*llama.Model)(nil)

// vocabulary loads the default model's.
func vocabulary(t testing.TB) *llama.Model {
	t.Helper()
	llama.Open(llama.Options{})
	m, err := llama.LoadModel(modeltest.Path(t), llama.ModelOptions{VocabularyOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// tokenizerJSON is the default model's, as scripts/golden/tokenizer_json.py made it, decoded.
func tokenizerJSON(t *testing.T) map[string]any {
	t.Helper()
	f, err := os.Open("testdata/tokenizer.json.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(unzipped)
	if err != nil {
		t.Fatal(err)
	}
	var file map[string]any
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	return file
}

// modelDir writes a model directory with this tokenizer.json.
func modelDir(t *testing.T, file any) string {
	t.Helper()
	data, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tokenizer.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

var corpus = []string{
	"The capital of France is Paris.", "It's what we'll see, they've said; I'D don't.", "naïve café — “quoted” … ½ ²",
	"中国的首都是北京。", "下列哪一项是正确的？\nA. 苹果\nB. 香蕉\nC. 梨\nD. 桃", "日本語のテキスト、カタカナ。", "한국어 문장입니다.", "Привет, мир!", "مرحبا بالعالم", "हिन्दी पाठ",
	"func main() {\n\tfmt.Println(\"hi\") // say it\n}\n", "for (int i=0;i<10;++i){a[i]*=2;}", "SELECT * FROM t WHERE x >= 3.14 AND y != 'z';", "{\"a\": [1, 2.5e-3, null], \"b\": \"\\n\"}",
	"👍🏽 👩‍👩‍👧 🇫🇷 é e\u0301", "0 12 123 1234 12345678 3.14159 1,000,000 ١٢٣ ４５６ Ⅷ ①", "x1y22z333", "2026-11-23T12:00:00Z",
	" ", "  ", "   leading", "trailing   ", "a  b   c    d", "\n", "\n\n", "\n\n\n", "\r\n", " \n ", "\t\t x", "a\n\nb\n \nc", "\u00a0nbsp\u3000wide", "\u200bzero\ufeff",
	"<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_start|>", "<|im_end|><|im_end|>", "<|im_end", "a<|im_end|>b", " <|im_end|> ", "<repo_name>x<file_sep>", "<|not_special|>",
	"A", "B", " A", "Answer: A", "a", "ÿ", "\x7f", "supercalifragilisticexpialidocious", strings.Repeat("a", 300), strings.Repeat(" ", 300), strings.Repeat("ab1 ", 100), "",
}

// tokenizer.json and the GGUF's vocabulary make the same tokens, alone and in random mixtures.
func TestTokenizerJSONIsTheVocabulary(t *testing.T) {
	t.Parallel()
	m := vocabulary(t)
	ours, err := prompt.New(prompt.Options{Template: m.ChatTemplate(), Vocabulary: m})
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	theirs, err := prompt.Open(modelDir(t, tokenizerJSON(t)), m.ChatTemplate(), m)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()

	texts := slices.Clone(corpus)
	random := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		var text strings.Builder
		for range 1 + random.IntN(6) {
			fragment := []rune(corpus[random.IntN(len(corpus))])
			start := random.IntN(len(fragment) + 1)
			text.WriteString(string(fragment[start : start+random.IntN(len(fragment)-start+1)]))
		}
		texts = append(texts, text.String())
	}
	tokens, differences := 0, 0
	for _, text := range texts {
		a, err := ours.Encode(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		b, err := theirs.Encode(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		tokens += len(a)
		if !slices.Equal(a, b) {
			if differences++; differences <= 10 {
				t.Errorf("%q:\n llama.cpp      %v %q\n tokenizer.json %v %q", text, a, pieces(m, a), b, pieces(m, b))
			}
		}
	}
	t.Logf("%d texts, %d tokens, %d texts differ", len(texts), tokens, differences)

	messages := []wire.Message{{Role: "system", Content: "请回答。"}, user("1234 + 5?\nA. x"), assistant("A"), user("👍 再来"), assistant("北京 42")}
	rows := func(b *prompt.Builder) ([]engine.Token, []float32) {
		rows, err := b.Rows(t.Context(), prompt.Chat{Messages: messages})
		if err != nil || len(rows) != 1 {
			t.Fatalf("%d rows, %v", len(rows), err)
		}
		return rows[0].Tokens, rows[0].Weights
	}
	a, aw := rows(ours)
	b, bw := rows(theirs)
	if diff := cmp.Diff(a, b) + cmp.Diff(aw, bw); diff != "" {
		t.Errorf("row (-llama.cpp +tokenizer.json):\n%s", diff)
	}
	var turns []string
	for i := 0; i < len(a); i++ {
		var turn strings.Builder
		for ; i < len(a) && aw[i] != 0; i++ {
			turn.Write(m.Piece(a[i]))
		}
		if turn.Len() > 0 {
			turns = append(turns, turn.String())
		}
	}
	if diff := cmp.Diff([]string{"A<|im_end|>", "北京 42<|im_end|>"}, turns); diff != "" {
		t.Errorf("trained (-want +got):\n%s", diff)
	}
}

func pieces(v prompt.Vocabulary, tokens []engine.Token) []string {
	var out []string
	for _, t := range tokens {
		out = append(out, string(v.Piece(t)))
	}
	return out
}

// A file that cuts or pads is read without these settings; one of another model, or none at all, is refused.
func TestTokenizerJSONIsChecked(t *testing.T) {
	t.Parallel()
	m := vocabulary(t)
	file := tokenizerJSON(t)
	file["truncation"] = map[string]any{"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
	file["padding"] = map[string]any{"strategy": map[string]any{"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": nil, "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>"}
	b, err := prompt.Open(modelDir(t, file), m.ChatTemplate(), m)
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := b.Encode("one two three four five six seven")
	if err != nil || len(tokens) != 7 {
		t.Errorf("%d tokens (%v), want 7", len(tokens), err)
	}
	if _, err := b.Encode("a\x00b"); err == nil || !strings.Contains(err.Error(), "NUL character at byte 1") {
		t.Errorf("NUL: %v", err)
	}
	if tokens, err := b.Encode("a\xffb"); err != nil || len(tokens) == 0 {
		t.Errorf("text that is not UTF-8: %v", err)
	}
	b.Close()
	b.Close()
	if _, err := b.Encode("x"); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("after Close: %v", err)
	}

	other := tokenizerJSON(t)
	vocab := other["model"].(map[string]any)["vocab"].(map[string]any)
	vocab["Hello"], vocab["hello"] = vocab["hello"], vocab["Hello"]
	for name, file := range map[string]any{
		"other tokens":  other,
		"no tokenizer":  map[string]any{"a": 1},
		"wrong version": map[string]any{"version": "1.0", "model": map[string]any{"type": "nothing"}},
		"not an object": []int{1},
	} {
		if b, err := prompt.Open(modelDir(t, file), "", m); err == nil {
			t.Errorf("%s: no error", name)
			b.Close()
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}

// chat_template.jinja in the model directory is used instead of the file's own template.
func TestOpenPrefersTheDirectorysTemplate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	v := byteVocabulary{}
	if err := os.WriteFile(filepath.Join(dir, "chat_template.jinja"), []byte("of the directory"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := prompt.Open(dir, "of the file", v)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if text, err := b.Text(t.Context(), []wire.Message{user("Q")}); err != nil || text != "of the directory" {
		t.Errorf("got %q, %v", text, err)
	}
	if _, err := prompt.Open(t.TempDir(), "{% if %}", v); err == nil || !strings.Contains(err.Error(), "chat template") {
		t.Errorf("a template that cannot be parsed: %v", err)
	}
}
