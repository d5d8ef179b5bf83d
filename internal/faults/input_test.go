//go:build faults

package faults

import (
	"bufio"
	"context"
	endian "encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hone-llm/hone/internal/gguf"
)

// TestMalformedInput sends bodies and training files that are not what they should be.
func TestMalformedInput(t *testing.T) {
	p := prove(t, "R11", "malformed JSON bodies, forms and training files: byte order marks, NUL, invalid UTF-8, a line of 100 MB, 100,000 levels, repeated keys", "never a 5xx, never a panic; training files are refused by the number of the line")
	random := random(t)
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	if _, _, err := s.chat(t.Context(), tiny, "a", 2); err != nil {
		t.Fatal(err)
	}
	runner := s.children(t)
	good := `{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":1,"stop":["b"],"temperature":0.5}`
	bodies := []string{"", " ", "null", "[]", `"a"`, "1", "{", "}", "{}{}", good + good, "\xef\xbb\xbf" + good, "\xff\xfe{\x00}\x00", `{"model":"tiny","model":"other"}`, `{"messages":[` + strings.Repeat(`[`, 100_000),
		strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000), `{"messages":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + "}", "{\"a\x00\":1}", `{"model":"\ud800"}`, `{"model":"` + "\xc3\x28" + `"}`,
		`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"file:///etc/passwd"}}]}]}`, `{"messages":[null]}`, `{"messages":[{"role":["user"]}]}`, `{"messages":{}}`, "{'model':'tiny'}", "model=tiny", "<a/>"}
	for range 100 { // and what is nearly right
		b := []byte(good)
		for range 1 + random.IntN(3) {
			at := random.IntN(len(b))
			switch random.IntN(3) {
			case 0:
				b[at] = byte(random.Uint32())
			case 1:
				b = slices.Delete(b, at, min(len(b), at+1+random.IntN(4)))
			default:
				b = slices.Insert(b, at, []byte(`{}[]",:\0`)[random.IntN(9)])
			}
			if len(b) == 0 {
				b = []byte("{")
			}
		}
		bodies = append(bodies, string(b))
	}
	n, refused := 0, 0
	for _, r := range s.routes(t) {
		if r.method != http.MethodPost {
			continue
		}
		for _, body := range bodies {
			if status, text := s.raw(t, r.method, r.at("none"), body); status == 0 || status >= 500 {
				t.Errorf("%s with %.80q: %d %.300s", r.path, body, status, text)
			} else if status >= 400 {
				refused++
			}
			n++
		}
	}
	for _, form := range []string{"", "--b", "--b\r\n\r\n--b--\r\n", "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nno end", "--b\r\nContent-Disposition: form-data; name=\"file\r\n\r\na\r\n--b--\r\n",
		"--b\r\n" + strings.Repeat("X: y\r\n", 20000) + "\r\n\r\n--b--\r\n", strings.Repeat("--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\na\r\n", 20000) + "--b--\r\n",
		"--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n" + strings.Repeat("a", 1<<20) + "\r\n--b--\r\n", "\x00\xff"} {
		for _, kind := range []string{"multipart/form-data; boundary=b", "multipart/form-data", "multipart/form-data; boundary=" + strings.Repeat("b", 100), "multipart/mixed; boundary=b"} {
			status, text := s.raw(t, http.MethodPost, "/v1/files", form, "Content-Type", kind)
			mustRefuse(t, fmt.Sprintf("form %.60q as %.40s", form, kind), status, text)
			n++
		}
	}
	// Training files. A bad line is the third where nothing else is said.
	line := `{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}` + "\n"
	wrong, right := 0, 0
	for _, c := range []struct {
		what, content string
		line          string // "": it is a good file
	}{
		{"a byte order mark and CRLF", "\xef\xbb\xbf" + strings.ReplaceAll(strings.Repeat(line, 3), "\n", "\r\n"), ""},
		{"no end of the last line", strings.TrimSuffix(strings.Repeat(line, 3), "\n"), ""},
		{"NUL", line + line + "{\"messages\":\x00}\n", "3"},
		{"invalid UTF-8", line + line + strings.Replace(line, `"a"`, "\"\xc3\x28\"", 1), "3"},
		{"a line of 100 MB", line + line + strings.Replace(line, `"a"`, `"`+strings.Repeat("a", 100<<20)+`"`, 1), "3"},
		{"100,000 levels", line + line + strings.Repeat("[", 100_000) + "\n", "3"},
		{"100,000 levels in a row", line + line + `{"messages":` + strings.Repeat(`{"a":`, 100_000) + "\n", "3"},
		{"half a line", line + line + line[:30] + "\n" + line, "3"},
		{"a row that is no object", line + line + "17\n", "3"},
		{"a role of its own", line + line + strings.Replace(line, "user", "root", 1), "3"},
		{"no answer", line + line + `{"messages":[{"role":"user","content":"a"}]}` + "\n", "3"},
		{"another encoding", "\xff\xfe" + strings.ReplaceAll(line, "", "\x00"), "1"},
		{"nothing", "", "empty"},
		{"only white space", "\n\r\n \n", ""},
	} {
		id, err := s.tryUpload(t.Context(), "train.jsonl", strings.NewReader(c.content))
		if err != nil {
			if c.line == "empty" {
				wrong++
				n++
				continue
			}
			t.Fatalf("%s: %v", c.what, err)
		}
		var j job
		status, text, err := s.do(t.Context(), http.MethodPost, "/v1/fine_tuning/jobs", map[string]any{"model": tiny, "training_file": id, "hone": map[string]any{"max_steps": 1}}, &j)
		if err != nil || status != http.StatusOK {
			t.Fatalf("%s: %d %s %v", c.what, status, text, err)
		}
		j = s.await(t, j.ID, 2*time.Minute)
		switch {
		case c.what == "only white space" || c.line == "empty":
			if j.Status != "failed" || j.Error.Message == "" {
				t.Errorf("%s: %+v", c.what, j)
			}
			wrong++
		case c.line == "":
			if j.Status != "succeeded" {
				t.Errorf("%s: %+v", c.what, j)
			}
			right++
		default:
			if j.Status != "failed" || !strings.Contains(j.Error.Message, "line "+c.line) {
				t.Errorf("%s: %s %.400s", c.what, j.Status, j.Error.Message)
			}
			wrong++
		}
		n++
	}
	p.inject(n)
	if now := s.children(t); !slices.Equal(runner, now) {
		t.Errorf("the children are %v, they were %v", now, runner)
	}
	if log, _ := os.ReadFile(s.log); strings.Contains(string(log), "panic") {
		t.Errorf("the log has a panic:\n%s", s.tail())
	}
	p.found("%d bodies refused with 4xx, none with 5xx; %d training files refused (a bad line by its number), %d odd ones trained; the same runner, no panic", refused, wrong, right)
}

// TestDeleteServing deletes adapters in the middle of their streams.
func TestDeleteServing(t *testing.T) {
	p := prove(t, "R12", "an adapter deleted while it serves, 100 rounds", "the stream ends as it would have, the next request is told 404, the files go and memory comes back")
	s := start(t, newHome(t), "HONE_LOG_LEVEL=error")
	name, dir := s.tuned(t)
	type reply struct{ text, end string }
	stream := func(ctx context.Context, model string, first func()) (r reply, err error) {
		body := fmt.Sprintf(`{"model":%q,"stream":true,"max_tokens":60,"temperature":0,"logit_bias":{"2":-100},"messages":[{"role":"user","content":"问 1"}]}`, model)
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/v1/chat/completions", strings.NewReader(body))
		if err != nil {
			return r, err
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return r, err
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		for lines.Scan() {
			data, ok := strings.CutPrefix(lines.Text(), "data: ")
			if !ok {
				continue
			}
			if data == "[DONE]" {
				r.end = data
				break
			}
			var chunk struct {
				Choices []struct{ Delta struct{ Content string } }
			}
			if err := json.Unmarshal([]byte(data), &chunk); err != nil {
				return r, err
			}
			for _, c := range chunk.Choices {
				if r.text += c.Delta.Content; c.Delta.Content != "" && first != nil {
					first()
					first = nil
				}
			}
		}
		return r, lines.Err()
	}
	want, err := stream(t.Context(), name, nil)
	if err != nil || want.end == "" || want.text == "" {
		t.Fatalf("%+v, %v", want, err)
	}
	runner := s.children(t)
	if len(runner) != 1 {
		t.Fatal(runner)
	}
	before := 0
	for i := range 100 {
		if i == 10 {
			before = resident(t, runner[0], "VmRSS")
		}
		id := fmt.Sprintf("round%d", i)
		victim := plant(t, dir, id, nil, nil)
		got, err := stream(t.Context(), victim, func() {
			if status, text, err := s.do(t.Context(), http.MethodDelete, "/v1/models/"+victim, nil, nil); err != nil || status != http.StatusOK {
				t.Errorf("delete: %d %s %v", status, text, err)
			}
			if _, status, err := s.chat(t.Context(), victim, "问 1", 1); status != http.StatusNotFound {
				t.Errorf("the next request: %d %v", status, err)
			}
		})
		if err != nil || got != want {
			t.Fatalf("round %d: %+v, %v; want %+v", i, got, err, want)
		}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if _, err := os.Stat(filepath.Join(s.home, "adapters", id)); os.IsNotExist(err) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the files of %s are still there", id)
			}
		}
		p.inject(1)
	}
	grown := resident(t, runner[0], "VmRSS") - before
	if now := s.children(t); !slices.Equal(runner, now) {
		t.Errorf("the children are %v, they were %v", now, runner)
	}
	if grown > 32 {
		t.Errorf("the runner grew by %d MiB over 90 rounds", grown)
	}
	p.found("100 streams ended word for word, 100 next requests got 404, all files are gone; the runner grew by %d MiB over the last 90 rounds", grown)
}

// TestParity compares the tokens of the trainer with those of the server.
func TestParity(t *testing.T) {
	p := prove(t, "R20", "the same conversations through training and through chat, for every architecture and every template of the tests", "the tokens that are trained begin with exactly those that the server computes for the prompt, id for id")
	home := newHome(t)
	models := []string{}
	add := func(file, name, template string) {
		args := []string{"models", "add", file, "--name", name}
		if template != "" {
			args = append(args, "--chat-template", template)
		}
		if out, err := command(t, home, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", name, err, out)
		}
		models = append(models, name)
	}
	for _, name := range []string{"q8_0", "llama3", "mistral", "qwen2", "qwen3"} {
		file := "../train/testdata/tiny-" + name + ".gguf"
		if name == "q8_0" {
			file = "../train/testdata/tiny-llama-q8_0.gguf"
		}
		add(file, "tiny-"+name, "")
	}
	templates, err := filepath.Glob("../prompt/testdata/*.jinja")
	if err != nil || len(templates) < 5 {
		t.Fatalf("%v %v", templates, err)
	}
	for _, template := range templates {
		name := strings.TrimSuffix(filepath.Base(template), ".jinja")
		path := filepath.Join(t.TempDir(), name+".gguf")
		if err := os.WriteFile(path, withEnd(t, endOf[name]), 0o600); err != nil {
			t.Fatal(err)
		}
		add(path, name, template)
	}
	s := start(t, home, "HONE_LOG_LEVEL=error", "HONE_RUNNER_IDLE_TIMEOUT=5s")
	message := func(role, content string) map[string]any { return map[string]any{"role": role, "content": content} }
	conversations := [][]any{
		{message("user", "问 1: Which one?")},
		{message("user", "  blanks\n\n and <|im_end|> markers </s> ")},
		{message("user", "émoji 🙂 and \u200b"), message("assistant", "A"), message("user", "again")},
		{message("system", "Answer with one letter."), message("user", "B or C?")},
	}
	compared, unable := 0, 0
	for _, model := range models {
		for i, conversation := range conversations {
			var tokenized struct{ Tokens []int32 }
			status, text, err := s.do(t.Context(), http.MethodPost, "/v1/tokenize", map[string]any{"model": model, "messages": conversation}, &tokenized)
			if err != nil {
				t.Fatal(err)
			}
			if status == http.StatusBadRequest && i == 3 { // a template without system messages
				unable++
				continue
			}
			var chat struct {
				Usage struct {
					PromptTokens int `json:"prompt_tokens"`
				}
			}
			if status != http.StatusOK {
				t.Errorf("%s: %d %s", model, status, text)
				continue
			}
			s.must(t, http.MethodPost, "/v1/chat/completions", map[string]any{"model": model, "messages": conversation, "max_tokens": 1}, &chat)
			if chat.Usage.PromptTokens != len(tokenized.Tokens) {
				t.Errorf("%s, conversation %d: usage says %d tokens, tokenize %d", model, i, chat.Usage.PromptTokens, len(tokenized.Tokens))
			}
			row, err := json.Marshal(map[string]any{"messages": append(slices.Clone(conversation), message("assistant", "B"))})
			if err != nil {
				t.Fatal(err)
			}
			_ = os.RemoveAll(filepath.Join(home, "cache", "tokenized"))
			var dry struct {
				TrainTokens int `json:"train_tokens"`
			}
			s.must(t, http.MethodPost, "/v1/fine_tuning/jobs/dry_run", map[string]any{"model": model, "training_file": s.upload(t, "row.jsonl", string(row)+"\n")}, &dry)
			// Where a template leaves out what was thought in earlier turns, each answer is an example of its own.
			examples, total := trainedTokens(t, home), 0
			for _, example := range examples {
				total += len(example)
			}
			if total != dry.TrainTokens {
				t.Errorf("%s, conversation %d: the dry run says %d tokens, the tokenized file has %d", model, i, dry.TrainTokens, total)
			}
			trained := examples[len(examples)-1]
			if len(trained) <= len(tokenized.Tokens) || !slices.Equal(trained[:len(tokenized.Tokens)], tokenized.Tokens) {
				t.Errorf("%s, conversation %d: trained on %v, the prompt is %v", model, i, trained, tokenized.Tokens)
			}
			compared++
			p.inject(1)
		}
	}
	if compared < 3*len(models) {
		t.Errorf("only %d were compared", compared)
	}
	p.found("%d conversations of %d models and templates: the same ids, and the same count in usage.prompt_tokens (%d that a template refuses are left out)", compared, len(models), unable)
}

// endOf is the token with which each of the templates of package prompt's tests ends a turn.
var endOf = map[string]string{
	"deepseek-r1-distill-llama": "<｜end▁of▁sentence｜>", "deepseek-r1-distill": "<｜end▁of▁sentence｜>", "hermes": "<|im_end|>", "llama3.1": "<|eot_id|>", "llama3": "<|eot_id|>",
	"mistral": "</s>", "qwen2.5-instruct": "<|im_end|>", "qwen2.5": "<|im_end|>", "qwen3-0.6b": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>",
}

// withEnd is the tiny model with another text for its token that ends a turn.
func withEnd(t *testing.T, end string) []byte {
	t.Helper()
	f, err := gguf.Open("../train/testdata/tiny-llama-q4_1.gguf")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tokens, ok := f.Metadata.Strings("tokenizer.ggml.tokens")
	id, ok2 := f.Metadata.Int("tokenizer.ggml.eos_token_id")
	if !ok || !ok2 || end == "" {
		t.Fatalf("the end of a turn %q cannot be written", end)
	}
	if i := slices.Index(tokens, end); i >= 0 {
		tokens[i] = tokens[id]
	}
	tokens[id] = end
	return variant(t, map[string]any{"tokenizer.ggml.tokens": tokens, "llama.context_length": uint32(4096)})
}

// trainedTokens reads the examples of the only tokenized file: package dataset, cache.go.
func trainedTokens(t *testing.T, home string) (examples [][]int32) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(home, "cache", "tokenized", "*.rows"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%d tokenized files, %v", len(files), err)
	}
	file, err := os.ReadFile(files[0])
	if err != nil || len(file) < 20 {
		t.Fatalf("%s has %d bytes, %v", files[0], len(file), err)
	}
	index, rows := endian.LittleEndian.Uint64(file[len(file)-20:]), endian.LittleEndian.Uint64(file[len(file)-12:])
	for row := range rows {
		data := file[endian.LittleEndian.Uint64(file[index+8*row:]):]
		next := func() int {
			v, n := endian.Uvarint(data)
			if n <= 0 {
				t.Fatal("the tokenized file is not as expected")
			}
			data = data[n:]
			return int(v)
		}
		candidates, _, _, prefix := next(), next(), next(), next()
		if candidates != 1 {
			t.Fatalf("%d candidates", candidates)
		}
		var tokens []int32
		for range prefix {
			tokens = append(tokens, int32(next()))
		}
		for range next() {
			tokens = append(tokens, int32(next()))
		}
		examples = append(examples, tokens)
	}
	if len(examples) == 0 {
		t.Fatal("the tokenized file is empty")
	}
	return examples
}

// TestAdapterParity asks a base model before one of its adapters is loaded, beside it and after it is gone.
func TestAdapterParity(t *testing.T) {
	p := prove(t, "R20", "greedy answers of a base model before, beside and after an adapter, and of the adapter alone and beside it", "word for word the same")
	home := newHome(t)
	s := start(t, home, "HONE_LOG_LEVEL=error")
	ask := func(model string, n int) string {
		text, _, err := s.chat(t.Context(), model, fmt.Sprintf("问 %d: Which one? A B C D", n), 8)
		if err != nil {
			t.Fatal(err)
		}
		p.inject(1)
		return text
	}
	const questions = 20
	var before, alone [questions]string
	for n := range before {
		before[n] = ask(tiny, n)
	}
	j := s.train(t, s.upload(t, "train.jsonl", rows(10)), map[string]any{"r": 4, "num_train_epochs": 4, "batch_size": 2, "learning_rate": 2e-2})
	if j = s.await(t, j.ID, time.Minute); j.Status != "succeeded" {
		t.Fatalf("%+v", j)
	}
	for n := range alone {
		alone[n] = ask(j.FineTunedModel, n)
	}
	if alone == before {
		t.Error("the adapter answers as the base model does")
	}
	for n := range before {
		if base, tuned := ask(tiny, n), ask(j.FineTunedModel, n); base != before[n] || tuned != alone[n] {
			t.Errorf("question %d: beside each other the base model says %q, before %q; the adapter %q, before %q", n, base, before[n], tuned, alone[n])
		}
	}
	s.must(t, http.MethodDelete, "/v1/models/"+j.FineTunedModel, nil, nil)
	for n := range before {
		if base := ask(tiny, n); base != before[n] {
			t.Errorf("question %d: after the adapter is gone the base model says %q, before %q", n, base, before[n])
		}
	}
	p.found("%d questions, the same answers each time", questions)
}
