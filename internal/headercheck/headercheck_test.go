package headercheck

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const libraryHeader = `
enum color { RED = 1, BLUE = 4 };
struct point { int x; double y; bool (*hit)(void *); };
int area(struct point p, enum color c);
`

func TestCompare(t *testing.T) {
	t.Parallel()
	const same = `
#ifndef HONE_STRUCT
#define HONE_STRUCT(name) struct name
#endif
enum {
    HONE_RED = 1,
    HONE_BLUE = 4,
};
HONE_STRUCT(point) {
    int x; // pixels
    double y;
    bool (* hit)(void *);
};
int area(struct point p, unsigned int c);
`
	for _, c := range []struct{ name, old, new, want string }{
		{"same", "", "", ""},
		{"value", "HONE_BLUE = 4", "HONE_BLUE = 5", "value of BLUE"},
		{"field type", "double y", "float y", "size of point.y"},
		{"field order", "    int x; // pixels\n    double y;", "    double y;\n    int x;", "offset of point.x"},
		{"missing field", "    bool (* hit)(void *);\n", "", "size of point"},
		{"unknown field", "int x;", "int z;", "z"},
		{"parameter", "unsigned int c)", "float c)", "area"},
		{"result", "int area", "long area", "area"},
		{"unknown function", "int area", "int volume(int);\nint area", "volume"},
		{"unknown constant", "HONE_RED = 1", "HONE_GREEN = 1", "GREEN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			header := filepath.Join(dir, "api.h")
			write(t, header, strings.Replace(same, c.old, c.new, 1))
			write(t, filepath.Join(dir, "library.h"), "#include <stdbool.h>\n"+libraryHeader)
			err := Compare(header, []string{"library.h"}, []string{dir})
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("got error %v, want one that names %q", err, c.want)
			}
		})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
