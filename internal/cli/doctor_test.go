package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hone-llm/hone/internal/doctor"
)

func TestCheckTable(t *testing.T) {
	t.Parallel()
	checks := []doctor.Check{
		{Name: "GPU", Status: doctor.OK, Found: "none"},
		{Name: "data directory", Status: doctor.Problem, Found: "/主目录/数据 is full of many words", Fix: "free space"},
	}
	if diff := cmp.Diff(strings.Join([]string{
		" ok       GPU             none",
		" problem  data directory  /主目录/数据 is full of many words",
		"                          fix: free space",
	}, "\n"), checkTable(checks, 0)); diff != "" {
		t.Error(diff)
	}
	// Chinese characters are two columns wide.
	if diff := cmp.Diff(strings.Join([]string{
		" ok       GPU             none",
		" problem  data directory  /主目录/数据 is full",
		"                          of many words",
		"                          fix: free space",
	}, "\n"), checkTable(checks, 47)); diff != "" {
		t.Error(diff)
	}
}
