//go:build cgo

package conformance_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// document is an OpenAPI document whose answers can be validated.
type document struct {
	name       string
	prefix     string // of the server's paths before the document's
	root       map[string]any
	compiler   *jsonschema.Compiler
	schemas    map[string]*jsonschema.Schema // by JSON pointer
	operations []operation
	seen       map[string]bool // operations with an answer other than an error
}

type operation struct {
	method  string
	path    string   // as in the document
	parts   []string // of the path; "" is a parameter, which at the end may hold slashes
	pointer string   // to the operation in the document
}

// newDocument reads a document. Each change is applied to it before its schemas are compiled.
func newDocument(name, prefix string, data []byte, changes ...func(root map[string]any)) (*document, error) {
	root, err := jsonschema.UnmarshalJSON(strings.NewReader(string(data)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d := &document{name: name, prefix: prefix, root: root.(map[string]any), schemas: map[string]*jsonschema.Schema{}, seen: map[string]bool{}}
	for _, change := range changes {
		change(d.root)
	}
	modernise(d.root)
	d.compiler = jsonschema.NewCompiler()
	d.compiler.DefaultDraft(jsonschema.Draft2020)
	if err := d.compiler.AddResource(d.url(), d.root); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	for path, methods := range d.root["paths"].(map[string]any) {
		for method := range methods.(map[string]any) {
			op := operation{method: strings.ToUpper(method), path: path, pointer: "/paths/" + escape(path) + "/" + method}
			for part := range strings.SplitSeq(path, "/") {
				if strings.HasPrefix(part, "{") {
					part = ""
				}
				op.parts = append(op.parts, part)
			}
			op.parts = op.parts[1:]
			d.operations = append(d.operations, op)
		}
	}
	// Literal parts before parameters: /jobs/dry_run is not a job.
	slices.SortFunc(d.operations, func(a, b operation) int { return strings.Compare(b.path, a.path) })
	slices.SortStableFunc(d.operations, func(a, b operation) int { return parameters(a) - parameters(b) })
	return d, nil
}

func (d *document) url() string { return "https://localhost/" + d.name }

func parameters(o operation) int { return strings.Count(o.path, "{") }

func escape(part string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(part)
}

// modernise turns what OpenAPI 3.0 said in its own way, and what documents of 3.1 still hold, into JSON Schema 2020-12.
func modernise(node any) {
	switch node := node.(type) {
	case []any:
		for _, n := range node {
			modernise(n)
		}
	case map[string]any:
		for _, n := range node {
			modernise(n)
		}
		for old, limit := range map[string]string{"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"} {
			if exclusive, ok := node[old].(bool); ok {
				delete(node, old)
				if exclusive {
					node[old] = node[limit]
					delete(node, limit)
				}
			}
		}
		if nullable, ok := node["nullable"].(bool); ok {
			delete(node, "nullable")
			if nullable {
				same := map[string]any{}
				for key, value := range node {
					same[key] = value
					delete(node, key)
				}
				node["anyOf"] = []any{same, map[string]any{"type": "null"}}
			}
		}
	}
}

// find returns the operation of a request; path is without the prefix.
func (d *document) find(method, path string) (operation, bool) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for _, op := range d.operations {
		if op.method == method && matches(op.parts, parts) {
			return op, true
		}
	}
	return operation{}, false
}

func matches(pattern, parts []string) bool {
	for i, p := range pattern {
		switch {
		case i >= len(parts):
			return false
		case p == "" && i == len(pattern)-1 && pattern[0] == "models": // names may hold slashes
			return parts[i] != ""
		case p != "" && p != parts[i] || parts[i] == "":
			return false
		}
	}
	return len(pattern) == len(parts)
}

// at returns the value at a JSON pointer, or nil.
func (d *document) at(pointer string) any {
	var node any = d.root
	for part := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		part = strings.NewReplacer("~1", "/", "~0", "~").Replace(part)
		switch inner := node.(type) {
		case map[string]any:
			node = inner[part]
		case []any:
			i, err := strconv.Atoi(part)
			if err != nil || i >= len(inner) {
				return nil
			}
			node = inner[i]
		default:
			return nil
		}
	}
	return node
}

// validate holds a JSON value to the schema at a pointer.
func (d *document) validate(pointer string, body []byte) error {
	schema := d.schemas[pointer]
	if schema == nil {
		var err error
		if schema, err = d.compiler.Compile(d.url() + "#" + strings.ReplaceAll(strings.ReplaceAll(pointer, "{", "%7B"), "}", "%7D")); err != nil {
			return err
		}
		d.schemas[pointer] = schema
	}
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(body)))
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

// unexpected are the keys of OpenAI's objects that its schemas do not have, by the schema's name. The walk follows
// properties, items and references; where a schema has alternatives it takes the one that names the most keys.
func (d *document) unexpected(schema any, value any, at string, report func(at string)) {
	s, _ := schema.(map[string]any)
	if s == nil {
		return
	}
	if ref, ok := s["$ref"].(string); ok {
		d.unexpected(d.at(strings.TrimPrefix(ref, "#")), value, at, report)
		return
	}
	for _, alternatives := range []string{"anyOf", "oneOf", "allOf"} {
		if list, ok := s[alternatives].([]any); ok {
			var best []string
			for i, one := range list {
				var found []string
				d.unexpected(one, value, at, func(at string) { found = append(found, at) })
				if isNull, _ := one.(map[string]any)["type"].(string); isNull == "null" && value != nil {
					continue
				}
				if i == 0 || len(found) < len(best) {
					best = found
				}
			}
			for _, f := range best {
				report(f)
			}
			return
		}
	}
	switch value := value.(type) {
	case []any:
		for _, v := range value {
			d.unexpected(s["items"], v, at+"[]", report)
		}
	case map[string]any:
		properties, ok := s["properties"].(map[string]any)
		if !ok {
			return
		}
		for key, v := range value {
			if p, ok := properties[key]; ok {
				d.unexpected(p, v, at+"."+key, report)
			} else {
				report(at + "." + key)
			}
		}
	}
}

// decoded is a body as the walk takes it.
func decoded(body []byte) any {
	var v any
	_ = json.Unmarshal(body, &v) // validated before
	return v
}
