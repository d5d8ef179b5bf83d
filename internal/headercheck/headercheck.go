// Package headercheck proves that a header which declares part of a foreign C library again agrees with the library's
// own headers. It is used by tests only.
//
//	err := headercheck.Compare("api.h", []string{"llama.h"}, []string{dir + "/llama/llama.cpp/include", ...})
//
// The header under test keeps three rules, which make it readable by both compilers and by this package:
//
//   - a struct is written HONE_STRUCT(name) { ... }; with one field a line, and the header defines
//     HONE_STRUCT(name) as struct name unless it is defined already;
//   - a constant is an enumerator with the library's name behind the prefix HONE_;
//   - a function is declared with the library's name and the C types of the original.
//
// Compare writes one C file that includes the library's headers and then this one, its structs renamed. The compiler
// itself then refuses a function whose parameters or result differ; static assertions compare the size of every struct,
// the offset and size of every field and the value of every constant.
package headercheck

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

var (
	structPattern   = regexp.MustCompile(`(?s)HONE_STRUCT\((\w+)\)\s*\{(.*?)\n\};`)
	fieldPattern    = regexp.MustCompile(`^\s*[\w\s*]*?(\w+)(\[\w+\])?;|^\s*[\w\s]+\(\s*\*\s*(\w+)\)\(.*\);`)
	constantPattern = regexp.MustCompile(`(?m)^\s*HONE_(\w+)\s*(?:=[^,]*)?,`)
	functionPattern = regexp.MustCompile(`(?m)^[a-z][\w\s*]*?\b(\w+)\(`)
)

// ModuleDir returns the directory of a Go module as `go list` finds it, with its sources.
func ModuleDir(module string) (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return "", fmt.Errorf("go list -m %s: %w", module, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Compare checks the header against the library's headers, named as in #include and found in the include
// directories. The error holds the compiler's own messages. It needs gcc or clang as $CC or cc.
func Compare(header string, library, include []string) error {
	text, err := os.ReadFile(header)
	if err != nil {
		return err
	}
	program, err := comparison(string(text), header, library)
	if err != nil {
		return fmt.Errorf("%s: %w", header, err)
	}
	dir, err := os.MkdirTemp("", "headercheck")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	source := filepath.Join(dir, "compare.c")
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		return err
	}
	compiler := os.Getenv("CC")
	if compiler == "" {
		compiler = "cc"
	}
	args := []string{"-std=gnu11", "-fsyntax-only", "-Wno-deprecated-declarations"}
	for _, d := range include {
		args = append(args, "-I", d)
	}
	if out, err := exec.Command(compiler, append(args, source)...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s disagrees with %s:\n%s", header, strings.Join(library, ", "), out)
	}
	return nil
}

// comparison returns the C program whose compilation is the check.
func comparison(text, header string, library []string) (string, error) {
	absolute, err := filepath.Abs(header)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, l := range library {
		fmt.Fprintf(&b, "#include %q\n", l)
	}
	fmt.Fprintf(&b, "#define HONE_STRUCT(name) struct hone_##name\n#include %q\n", absolute)
	fields := 0
	for _, s := range structPattern.FindAllStringSubmatch(text, -1) {
		name := s[1]
		fmt.Fprintf(&b, "_Static_assert(sizeof(struct hone_%s) == sizeof(struct %s), \"size of %s\");\n", name, name, name)
		for line := range strings.Lines(s[2]) {
			if line, _, _ = strings.Cut(line, "//"); strings.TrimSpace(line) == "" {
				continue
			}
			m := fieldPattern.FindStringSubmatch(line)
			if m == nil {
				return "", fmt.Errorf("struct %s: cannot read field %q: write one field a line", name, strings.TrimSpace(line))
			}
			field := m[1] + m[3]
			fields++
			fmt.Fprintf(&b, "_Static_assert(__builtin_offsetof(struct hone_%[1]s, %[2]s) == __builtin_offsetof(struct %[1]s, %[2]s), \"offset of %[1]s.%[2]s\");\n", name, field)
			fmt.Fprintf(&b, "_Static_assert(sizeof(((struct hone_%[1]s *)0)->%[2]s) == sizeof(((struct %[1]s *)0)->%[2]s), \"size of %[1]s.%[2]s\");\n", name, field)
		}
	}
	constants := constantPattern.FindAllStringSubmatch(text, -1)
	for _, c := range constants {
		fmt.Fprintf(&b, "_Static_assert((long long)HONE_%[1]s == (long long)%[1]s, \"value of %[1]s\");\n", c[1])
	}
	// A function that the library does not have would be a new declaration and no conflict, so each one is looked
	// for in the library's headers by taking its address before our header is seen.
	var before strings.Builder
	functions := functionPattern.FindAllStringSubmatch(text, -1)
	for i, f := range functions {
		fmt.Fprintf(&before, "static const void * library_%d __attribute__((unused)) = (const void *)&%s;\n", i, f[1])
	}
	program := strings.Replace(b.String(), "#define HONE_STRUCT", before.String()+"#define HONE_STRUCT", 1)
	if fields == 0 && len(constants) == 0 && len(functions) == 0 {
		return "", errors.New("no struct, constant or function found")
	}
	return program, nil
}
