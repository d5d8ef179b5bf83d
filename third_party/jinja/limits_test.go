package jinja

import (
	"context"
	"errors"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// hostile are templates that would use up all memory, time or stack.
var hostile = map[string]string{
	"string doubling":            `{% set ns = namespace(s='x') %}{% for i in range(28) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}`,
	"string doubling with +":     `{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}`,
	"string repetition":          `{{ 'x' * 1000000000000 }}`,
	"nested repetition":          `{% set a = 'x' * 1000000 %}{% set l = namespace(l=[]) %}{% for i in range(60000) %}{% set _ = l.l.append(a ~ i) %}{% endfor %}`,
	"replace":                    `{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}`,
	"replace method":             `{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}`,
	"join":                       `{{ range(60000) | join('x' * 1000000) }}`,
	"indent":                     `{{ ('\n' * 100000) | indent(1000000000, true) }}`,
	"tojson indent":              `{{ [[1]] | tojson(indent=1000000000) }}`,
	"format":                     `{% set ns = namespace(s='{0}{0}') %}{% for i in range(40) %}{% set ns.s = ns.s.format(ns.s) %}{% endfor %}`,
	"range":                      `{% for i in range(10**9) %}{% endfor %}`,
	"range that overflows":       `{% for i in range(0, 9223372036854775807, 4611686018427387904) %}{% endfor %}`,
	"nested loops":               `{% for i in range(60000) %}{% for j in range(60000) %}{% for k in range(60000) %}{% endfor %}{% endfor %}{% endfor %}`,
	"output":                     `{% for i in range(60000) %}{{ 'x' * 1000 }}{% endfor %}`,
	"list doubling":              `{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = ns.l + ns.l %}{% endfor %}`,
	"list that grows in a loop":  `{% set l = [] %}{% for i in range(60000) %}{% for j in range(60000) %}{% set _ = l.append(l) %}{% endfor %}{% endfor %}`,
	"nested list is printed":     `{% set ns = namespace(l=[]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}`,
	"nested list as JSON":        `{% set ns = namespace(l=[]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}`,
	"nested lists are compared":  `{% set a = namespace(l=[]) %}{% set b = namespace(l=[]) %}{% for i in range(60) %}{% set a.l = [a.l, a.l] %}{% set b.l = [b.l, b.l] %}{% endfor %}{{ a.l == b.l }}`,
	"list of itself is printed":  `{% set l = [] %}{% set _ = l.append(l) %}{{ l }}`,
	"list of itself as JSON":     `{% set l = [] %}{% set _ = l.append(l) %}{{ l | tojson }}`,
	"lists of themselves":        `{% set l = [] %}{% set _ = l.append(l) %}{% set m = [] %}{% set _ = m.append(m) %}{{ l == m }}`,
	"namespace of itself":        `{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns }}`,
	"macro recursion":            `{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}`,
	"macro recursion in default": `{% macro f(x=f()) %}{% endmacro %}{{ f() }}`,
	"caller recursion":           `{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}`,
	"macro fan-out":              `{% macro a() %}xxxxxxxxxx{% endmacro %}{% macro b() %}{% for i in range(1000) %}{{ a() }}{% endfor %}{% endmacro %}{% macro c() %}{% for i in range(1000) %}{{ b() | length }}{% endfor %}{% endmacro %}{% for i in range(60000) %}{{ c() | length }}{% endfor %}`,
	"split":                      `{% set a = ('x,' * 500000) %}{% set l = [] %}{% for i in range(1000) %}{% set _ = l.append(a.split(',')) %}{% endfor %}`,
	"sort":                       `{% set a = ('10,x,9,' * 20000).split(',') %}{% for i in range(100) %}{% set _ = a | sort %}{% endfor %}`,
	"slice with a far start":     `{% for i in range(60000) %}{{ [1, 2, 3][-9223372036854775807:9223372036854775807:2] }}{% endfor %}`,
	"dict that grows":            `{% set d = dict() %}{% for i in range(60000) %}{% for j in range(60000) %}{% set _ = d.update({i ~ '-' ~ j: 'x' * 1000}) %}{% endfor %}{% endfor %}`,
	"deep expression":            `{{ ` + strings.Repeat("(", 100000) + "1" + strings.Repeat(")", 100000) + ` }}`,
	"deep list":                  `{{ ` + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + ` }}`,
	"many nots":                  `{{ ` + strings.Repeat("not ", 100000) + ` 1 }}`,
	"many signs":                 `{{ ` + strings.Repeat("-", 100000) + `1 }}`,
	"many conditions":            `{{ ` + strings.Repeat("1 if 0 else ", 100000) + ` 1 }}`,
	"long sum":                   `{{ 1` + strings.Repeat("+1", 100000) + ` }}`,
	"long chain":                 `{{ x` + strings.Repeat(".a", 100000) + ` }}`,
	"deep blocks":                strings.Repeat("{% if 1 %}", 50000) + strings.Repeat("{% endif %}", 50000),
}

// Every hostile template ends with an error, soon, without much memory.
func TestLimits(t *testing.T) {
	const memory = 1 << 30
	// A stack that grows without end is found at 64 MB rather than at 1 GB.
	defer debug.SetMaxStack(debug.SetMaxStack(64 << 20))
	for name, source := range hostile {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			template, err := Compile(source)
			if err == nil {
				_, err = template.RenderLimited(ctx, DefaultLimits, map[string]Value{})
			}
			took := time.Since(start)
			runtime.ReadMemStats(&after)
			if err == nil {
				if name == "slice with a far start" { // it is only slow in an engine that counts from the start
					return
				}
				t.Fatal("no error")
			}
			if took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			if grown := after.TotalAlloc - before.TotalAlloc; grown > memory {
				t.Errorf("allocated %d MiB", grown>>20)
			}
			t.Logf("%v, %d MiB: %v", took.Round(time.Millisecond), (after.TotalAlloc-before.TotalAlloc)>>20, err)
		})
	}
}

func TestCancelledRender(t *testing.T) {
	t.Parallel()
	template, err := Compile(`{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}`)
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := template.RenderLimited(ctx, DefaultLimits, nil); !errors.Is(err, cause) {
		t.Errorf("error is %v, want the context's cause", err)
	}
}

func TestStringAndOtherDoNotAdd(t *testing.T) {
	t.Parallel()
	for _, source := range []string{`{{ 'a' + 1 }}`, `{{ 'a' + none }}`, `{{ missing + 'a' }}`, `{{ 'a' + [1] }}`, `{{ none + 1 }}`} {
		template, err := Compile(source)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := template.RenderValues(nil); err == nil {
			t.Errorf("%s gives %q, want an error as in Python", source, text)
		}
	}
}

// No template makes the engine panic, overflow the stack or run on.
func FuzzRender(f *testing.F) {
	for _, source := range hostile {
		if len(source) < 1000 {
			f.Add(source)
		}
	}
	f.Add(`{%- for m in messages[1:] %}{{- '<' + m['role'] | upper + '>' ~ m.content.split('x', 1)[-1].strip() | tojson(indent=2) }}{% else %}{% endfor -%}`)
	f.Add(`{% macro f(a, b=1) %}{{ caller() }}{% endmacro %}{% call f(1) %}x{% endcall %}{{ 'a' if a is defined else none }}{# c #}{% raw %}{{{% endraw %}`)
	messages, err := FromJSON([]byte(`[{"role": "user", "content": "hé"}, {"role": "assistant", "content": null, "n": 1.5}]`))
	if err != nil {
		f.Fatal(err)
	}
	// Smaller than the default, which the hostile ones take a tenth of a second to come to: TestLimits tries those.
	limits := Limits{Steps: 20_000, Bytes: 64 << 10, Memory: 4 << 20, Items: 4096, Depth: DefaultLimits.Depth}
	f.Fuzz(func(t *testing.T, source string) {
		template, err := Compile(source)
		if err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		start := time.Now()
		_, err = template.RenderLimited(ctx, limits, map[string]Value{"messages": messages, "m": messages.AsList().Items[0]})
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("took %v: %v", took, err)
		}
	})
}
