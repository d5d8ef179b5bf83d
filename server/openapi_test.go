package server

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// TestOpenAPIRoutes holds the document to the routes, both ways.
func TestOpenAPIRoutes(t *testing.T) {
	t.Parallel()
	described := map[string]bool{}
	ids := map[string]bool{}
	for _, op := range operations {
		described[op.method+" "+op.path] = true
		if ids[op.id] || op.id == "" || op.summary == "" {
			t.Errorf("%s %s: the operation id %q is not its own, or there is no summary", op.method, op.path, op.id)
		}
		ids[op.id] = true
	}
	for _, route := range New(Options{}).engine.Routes() {
		key := route.Method + " " + route.Path
		if !described[key] {
			t.Errorf("%s is not in /openapi.json: add it to operations in openapi.go", key)
		}
		delete(described, key)
	}
	for key := range described {
		t.Errorf("%s is in operations and has no route", key)
	}
}

// TestOpenAPIDocument checks that references lead somewhere and that no description has lost its field.
func TestOpenAPIDocument(t *testing.T) {
	t.Parallel()
	_, all := describe(operations)
	for key := range shapes {
		if !all.used[key] {
			t.Errorf("shapes has %s, and no type of the API has that field", key)
		}
	}
	for name, fields := range required {
		component, _ := all.components[name].(schema)
		properties, _ := component["properties"].(schema)
		for _, field := range fields {
			if properties[field] == nil {
				t.Errorf("required has %s.%s, and no request has that field", name, field)
			}
		}
	}
	var document any
	if err := json.Unmarshal(openAPIDocument(), &document); err != nil {
		t.Fatal(err)
	}
	known := slices.Collect(maps.Keys(all.components))
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok && !slices.Contains(known, strings.TrimPrefix(ref, "#/components/schemas/")) {
				t.Errorf("%s is not in the document", ref)
			}
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(document)
}

// TestOpenAPISchema reads a type as requests and as answers describe it.
func TestOpenAPISchema(t *testing.T) {
	t.Parallel()
	type embedded struct {
		E *int `json:"e,omitempty"`
	}
	type thing struct {
		A struct{} `json:"a"` // no component: it has no name
		B *string  `json:"b"`
		C []int    `json:"c,omitempty"`
		embedded
	}
	s := &schemas{components: map[string]any{}, used: map[string]bool{}}
	for _, test := range []struct {
		request bool
		want    string
	}{
		{false, `{"properties":{"a":{"properties":{},"type":"object"},"b":{"type":["string","null"]},"c":{"items":{"type":"integer"},"type":"array"},"e":{"type":["integer","null"]}},"required":["a","b"],"type":"object"}`},
		{true, `{"properties":{"a":{"properties":{},"type":["object","null"]},"b":{"type":["string","null"]},"c":{"items":{"type":"integer"},"type":["array","null"]},"e":{"type":["integer","null"]}},"type":"object"}`},
	} {
		got, err := json.Marshal(s.object(reflect.TypeFor[thing](), test.request))
		if err != nil || string(got) != test.want {
			t.Errorf("request %v: %s, %v, want %s", test.request, got, err, test.want)
		}
	}
}
