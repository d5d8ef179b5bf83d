// Command audit runs govulncheck and gosec over the whole module and fails for every finding that has no reason here.
//
//	go run ./scripts/audit                        with the database at vuln.go.dev
//	go run ./scripts/audit -db file:///vulndb     with a copy of it (data/osv of golang/vulndb)
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// accepted are vulnerabilities that govulncheck finds and that are not hone's, each with the reason. One that it does not
// find any more has to go.
var accepted = map[string]string{
	"GO-2025-3557": ollama, "GO-2025-3558": ollama, "GO-2025-3559": ollama, "GO-2025-3582": ollama,
	"GO-2025-3689": ollama, "GO-2025-3695": ollama, "GO-2025-3824": ollama, "GO-2025-4251": ollama,
}

const ollama = "of Ollama's own server. hone takes from this module the C sources of llama.cpp and ggml alone, in packages whose only Go code is init; " +
	"it has a server of its own, and checks every model file in Go before C sees it (internal/gguf, with its fuzz tests)"

// excluded are rules of gosec that do not fit this program at all, each with the reason. Where a rule fits and a single line is
// right, the line says so: // #nosec G101 -- why.
var excluded = map[string]string{
	"G103": "unsafe: memory of C is seen as slices in a few places, whose sizes the types beside them know; go vet checks the rest",
	"G104": "unhandled errors: errcheck in make lint knows which cannot happen; this rule does not",
	"G115": "conversions of integers: tokens, rows and shapes are bounded where they enter (internal/gguf, internal/lora, internal/wire), and fuzzed there",
	"G204": "commands with variables: hone starts itself, and pip with a list of arguments; there is no shell",
	"G301": "directories of 0755: models and exported adapters are for others to read; the state of the server is 0700",
	"G302": "files of 0644: as G301",
	"G304": "files named by variables: reading the files that its user names is what a command does; no name of a request becomes a path",
	"G306": "files of 0644: as G301",
	"G404": "math/rand: shuffling, sampling, training seeds and the pauses before a retry; ids and keys are of crypto/rand",
	"G702": "commands with variables: as G204",
	"G703": "paths with variables: as G304",
}

func main() {
	log.SetFlags(0)
	db := flag.String("db", "", "the vulnerability database; empty: vuln.go.dev")
	offline := flag.Bool("offline", false, "go on if the database cannot be reached")
	flag.Parse()
	err := vulnerabilities(*db)
	if unreachable := new(unreachableError); *offline && errors.As(err, &unreachable) {
		fmt.Printf("\n**** NOT CHECKED FOR KNOWN VULNERABILITIES: the database cannot be reached (%s)\n\n", unreachable.message)
		err = nil
	}
	if err := errors.Join(err, weaknesses()); err != nil {
		log.Fatal(err)
	}
}

// tool is a command that tools/audit/go.mod pins.
func tool(name string, args ...string) *exec.Cmd {
	return exec.Command("go", append([]string{"tool", "-modfile=tools/audit/go.mod", name}, args...)...)
}

// unreachableError says that there is no database to ask.
type unreachableError struct{ message string }

func (e *unreachableError) Error() string {
	return "govulncheck: the database cannot be reached: " + e.message + "; name a copy with VULNDB=file:///..."
}

// vulnerabilities runs govulncheck. A finding counts where hone's code can call what is vulnerable.
func vulnerabilities(db string) error {
	args := []string{"-format", "json", "-tags", "faults"}
	if db != "" {
		args = append(args, "-db", db)
	}
	cmd := tool("govulncheck", append(args, "./...")...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		message := strings.TrimSpace(problems.String())
		if strings.Contains(message, "fetching vulnerabilities") {
			return &unreachableError{message}
		}
		return fmt.Errorf("govulncheck: %w\n%s", err, message)
	}
	found, titles := map[string]string{}, map[string]string{} // by id: where it is fixed, what it is
	for messages := json.NewDecoder(&out); ; {
		var message struct {
			OSV     *struct{ ID, Summary string }
			Finding *struct {
				OSV          string
				FixedVersion string `json:"fixed_version"`
				Trace        []struct{ Module, Version, Function string }
			}
		}
		if err := messages.Decode(&message); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("govulncheck: %w", err)
		}
		if message.OSV != nil {
			titles[message.OSV.ID] = message.OSV.Summary
		}
		if f := message.Finding; f != nil && len(f.Trace) > 0 && f.Trace[0].Function != "" {
			found[f.OSV] = fmt.Sprintf("%s %s, fixed in %q", f.Trace[0].Module, f.Trace[0].Version, f.FixedVersion)
		}
	}
	var failures []error
	for _, id := range slices.Sorted(maps.Keys(found)) {
		if accepted[id] == "" {
			failures = append(failures, fmt.Errorf("%s: %s (%s)", id, titles[id], found[id]))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(accepted)) {
		if found[id] == "" {
			failures = append(failures, fmt.Errorf("%s is not found any more: take it out of accepted in scripts/audit", id))
		}
	}
	fmt.Printf("govulncheck: %d vulnerabilities that hone's code reaches, %d of them explained in scripts/audit\n", len(found), len(accepted))
	return errors.Join(failures...)
}

// weaknesses runs gosec.
func weaknesses() error {
	cmd := tool("gosec", "-quiet", "-exclude-generated", "-exclude-dir", "third_party", "-nosec-require-rules", "-nosec-require-justification",
		"-exclude", strings.Join(slices.Sorted(maps.Keys(excluded)), ","), "./...")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("gosec: %w", err)
	}
	fmt.Printf("gosec: nothing; %d rules do not fit and are left out, with their reasons in scripts/audit\n", len(excluded))
	return nil
}
