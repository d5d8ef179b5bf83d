package jinja

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Small templates render as Jinja2 renders them (testdata/parity.py).
func TestParityWithJinja2(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/parity.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Data  json.RawMessage
		Cases []struct{ Template, Want string }
	}
	if err := json.Unmarshal(data, &golden); err != nil {
		t.Fatal(err)
	}
	root, err := FromJSON(bytes.TrimSpace(golden.Data))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range golden.Cases {
		template, err := Compile(c.Template)
		if err != nil {
			t.Errorf("%q: %v", c.Template, err)
			continue
		}
		got, err := template.RenderValues(root.AsDict().Data)
		if err != nil {
			t.Errorf("%q: %v", c.Template, err)
			continue
		}
		if diff := cmp.Diff(c.Want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.Template, diff)
		}
	}
}
