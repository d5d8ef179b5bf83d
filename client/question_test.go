package client

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/text/encoding/simplifiedchinese"
	"golang.org/x/text/encoding/unicode"
)

const header = "ID, Question,Option A,Option B,Option C,Option D,Answer\n"

func TestParseQuestions(t *testing.T) {
	t.Parallel()
	one := []Question{{ID: "7", Row: 1, Line: 2, Text: "Which?", Options: [4]string{"w", "x", "y", "z"}, Answer: "B"}}
	gb18030 := func(text string) string {
		s, err := simplifiedchinese.GB18030.NewEncoder().String(text)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	utf16, err := unicode.UTF16(unicode.LittleEndian, unicode.UseBOM).NewEncoder().String(header + "7,Which?,w,x,y,z,B\n")
	if err != nil {
		t.Fatal(err)
	}
	chinese := []Question{{ID: "1", Row: 1, Line: 2, Text: "下面哪一个是水果？", Options: [4]string{"苹果", "（铁）", "马", "红色"}, Answer: "A"}}
	for _, test := range []struct {
		name, file string
		options    ReadOptions
		want       []Question
		wantErr    string
	}{
		{name: "as the first user's", file: header + "7,Which?,w,x,y,z,B\n", want: one},
		{name: "byte order mark and quoted first header", file: "\uFEFF\"ID\",Question,Option A,Option B,Option C,Option D,Answer\n7,Which?,w,x,y,z,B\n", want: one},
		{name: "CRLF", file: strings.ReplaceAll(header+"7,Which?,w,x,y,z,B\n", "\n", "\r\n"), want: one},
		{name: "CR", file: strings.ReplaceAll(header+"7,Which?,w,x,y,z,B\n", "\n", "\r"), want: one},
		{name: "UTF-16", file: utf16, want: one},
		{name: "no last line end, spaces, lower case", file: "id , QUESTION,option a,OptionB, option_c ,Option-D,answer\n 7 , Which? , w, x,y , z ,b", want: one},
		{name: "other order, other columns", file: "Answer,Note,D,C,B,A,ID,Question\nB,n,z,y,x,w,7,Which?\n", want: one},
		{name: "semicolons", file: "ID;Question;A;B;C;D;Answer\n7;Which?;w;x;y;z;(b)\n", want: one},
		{name: "full width", file: "ＩＤ,Question,Option　A,Option B,Option C,Option D,Answer\n7,Which?,w,x,y,z,Ｂ．\n", want: one},
		{name: "space before a quote", file: header + `7, "Which?",w, "x",y,z,B` + "\n", want: one},
		{name: "empty rows at the end", file: header + "7,Which?,w,x,y,z,B\n,,,,,,\n\n", want: one},
		{name: "GB18030", file: gb18030("编号,题目,选项A,选项B,选项C,选项D,答案\n1,下面哪一个是水果？,苹果,（铁）,马,红色,A\n"), options: ReadOptions{Encoding: "gb18030"}, want: chinese},
		{name: "GBK", file: gb18030("编号,题目,选项A,选项B,选项C,选项D,答案\n1,下面哪一个是水果？,苹果,（铁）,马,红色,A\n"), options: ReadOptions{Encoding: "GBK"}, want: chinese},
		{name: "no ID, no answer", file: "Question,Option A,Option B,Option C,Option D\nWhich?,w,x,y,z\n",
			want: []Question{{ID: "1", Row: 1, Line: 2, Text: "Which?", Options: [4]string{"w", "x", "y", "z"}}}},
		{name: "line break, comma and quote in a cell", file: header + "7,\"Look,\nwhich \"\"one\"\"?\",w,x,y,z,B\n8,n,w,x,y,z,\n",
			want: []Question{{ID: "7", Row: 1, Line: 2, Text: "Look,\nwhich \"one\"?", Options: [4]string{"w", "x", "y", "z"}, Answer: "B"},
				{ID: "8", Row: 2, Line: 4, Text: "n", Options: [4]string{"w", "x", "y", "z"}}}},
		{name: "missing cells allowed", file: header + "7,Which?,w,,y,z,\n", options: ReadOptions{AllowMissing: true, NeedAnswer: true},
			want: []Question{{ID: "7", Row: 1, Line: 2, Text: "Which?", Options: [4]string{"w", "", "y", "z"}, Missing: []string{"Option B", "Answer"}}}},

		{name: "encoding not named", file: gb18030(header + "1,题目,w,x,y,z,A\n"), wantErr: `q.csv: line 2 is not UTF-8 (byte 58 is 0xcc): name the encoding; for Chinese text of a spreadsheet program it is gb18030`},
		{name: "wrong encoding", file: "a,b\xff\xff\n", options: ReadOptions{Encoding: "gbk"}, wantErr: "q.csv: line 1 is not gbk: name another encoding"},
		{name: "unknown encoding", file: header, options: ReadOptions{Encoding: "klingon"}, wantErr: `q.csv: unknown encoding "klingon"; use utf-8, gb18030, gbk, big5, shift_jis, euc-kr, utf-16le...`},
		{name: "empty", file: "", wantErr: "q.csv: the file is empty"},
		{name: "header only", file: header, wantErr: "q.csv: there are no questions in it"},
		{name: "no such column", file: "ID,Question,Option A,Option B,Option D\n", wantErr: `q.csv:1: column "Option C": there is no such column; the header has "ID", "Question", "Option A", "Option B", "Option D"`},
		{name: "answers needed", file: "Question,A,B,C,D\nq,w,x,y,z\n", options: ReadOptions{NeedAnswer: true}, wantErr: `q.csv:1: column "Answer": there is no such column; the header has "Question", "A", "B", "C", "D"`},
		{name: "column twice", file: "Question,question,A,B,C,D\n", wantErr: `q.csv:1: column "Question": the header has it twice: "Question" and "question"`},
		{name: "empty cell", file: header + "7,Which?,w,x,y,z,B\n8,Which?,w,x, ,z,B\n", wantErr: `q.csv:3: row 2: column "Option C": the cell is empty`},
		{name: "short row", file: header + "7,Which?,w,x\n", wantErr: `q.csv:2: row 1: column "Option C": the row ends before it: 4 cells, the header has 7`},
		{name: "long row", file: header + "7,Look, which?,w,x,y,z,B\n", wantErr: "q.csv:2: row 1: 8 cells, the header has 7: is a comma in a cell without quotes around it?"},
		{name: "bad answer", file: header + "7,Which?,w,x,y,z,E\n", wantErr: `q.csv:2: row 1: column "Answer": expected A, B, C or D, not "E"`},
		{name: "ID twice", file: header + "7,q,w,x,y,z,A\n7,q,w,x,y,z,A\n", wantErr: `q.csv:3: row 2: column "ID": "7" is also the ID of row 1`},
		{name: "quote left open", file: header + "7,q,w,x,y,z,A\n8,\"q,w,x,y,z,A\n9,q,w,x,y,z,A\n", wantErr: `q.csv:4: row 2: extraneous or missing " in quoted-field at byte 15 of the line; the row begins on line 3`},
	} {
		got, err := ParseQuestions("q.csv", []byte(test.file), test.options)
		if test.wantErr != "" {
			var fileError *FileError
			if err == nil || err.Error() != test.wantErr || !errors.As(err, &fileError) {
				t.Errorf("%s: error\n\t%v\nwant\n\t%s", test.name, err, test.wantErr)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", test.name, diff)
		}
	}
}

func TestExampleFiles(t *testing.T) {
	t.Parallel()
	dir := filepath.Join("..", "examples", "mcq")
	train, err := ReadQuestions(filepath.Join(dir, "train.csv"), ReadOptions{NeedAnswer: true, AllowMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	missing := 0
	for _, q := range train {
		missing += min(1, len(q.Missing))
	}
	if len(train) != 614 || missing != 6 {
		t.Errorf("train.csv: %d rows, %d with missing cells; want 614 and 6", len(train), missing)
	}
	test, err := ReadQuestions(filepath.Join(dir, "test.csv"), ReadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	answers, err := ReadAnswers(filepath.Join(dir, "test_answers.csv"), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range test {
		if answers[q.ID] == "" || q.Answer != "" {
			t.Errorf("test.csv: question %s: answer %q in the file, %q beside it", q.ID, q.Answer, answers[q.ID])
		}
	}
	// The Chinese file reads the same in each encoding.
	path := filepath.Join(dir, "zh.csv")
	want, err := ReadQuestions(path, ReadOptions{NeedAnswer: true})
	if err != nil || len(want) != 40 {
		t.Fatalf("zh.csv: %d questions, %v", len(want), err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := simplifiedchinese.GB18030.NewEncoder().Bytes(data)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseQuestions(path, encoded, ReadOptions{Encoding: "gb18030", NeedAnswer: true})
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("zh.csv as GB18030: %v (-want +got)\n%s", err, diff)
	}
}

func TestReadAnswersErrors(t *testing.T) {
	t.Parallel()
	for content, want := range map[string]string{
		"ID\n1\n":            `column "Answer": there is no such column; the header has "ID"`,
		"ID,Answer\n1\n":     "row 1: 1 cells, the header has 2",
		"ID,Answer\n1,yes\n": `row 1: column "Answer": expected A, B, C or D, not "yes"`,
	} {
		path := filepath.Join(t.TempDir(), "a.csv")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadAnswers(path, ""); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%q: error %v, want %s", content, err, want)
		}
	}
}

func FuzzParseQuestions(f *testing.F) {
	f.Add([]byte(header+"7,\"Wh\nich?\",w,x,y,z,B\n"), "")
	f.Add([]byte("\uFEFFID;Question;A;B;C;D\r\n1;q;a;b;c;d"), "gb18030")
	f.Fuzz(func(t *testing.T, data []byte, encoding string) {
		questions, err := ParseQuestions("f.csv", data, ReadOptions{Encoding: encoding})
		if err == nil && len(questions) == 0 {
			t.Error("no questions and no error")
		}
	})
}
