"""Renders small templates with Jinja2 as transformers sets it up, and writes parity.json beside this file.

Run it with jinja2 3.1 after adding a template: python3 testdata/parity.py
"""
import json
import pathlib

from jinja2.sandbox import ImmutableSandboxedEnvironment


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


TEMPLATES = [
    # white space around tags
    "{% if x %}{{ x }}\nafter{% endif %}",
    "{% if x %}{{ x }} after{% endif %}",
    "{%- if x -%}{{ x }} after{% endif %}",
    "a {{ x }} {%- if x %} b{% endif %}",
    "  {% if x %}\n    {{ x }}\n  {% endif %}\nend\n",
    "  {# note #}\n  {{ x }}\n",
    "a\n  {{- x -}}\n  b\n\n",
    "{% for i in [1, 2] %}\n  {% if i == 1 %}\n    one\n  {% else %}\n    other\n  {% endif %}\n{% endfor %}\n",
    "{% set y = 1 %}\n\n{{ y }}\r\nend\r\n",
    # numbers
    "{{ 1.0 }} {{ 0.5 }} {{ 1234567.0 }} {{ 0.00001 }}",
    "{{ d | tojson }}",
    "{{ d | tojson(indent=2) }}",
    "{{ d | tojson(indent=4) }}",
    "{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}{{ [[], {}] | tojson(indent=1) }}",
    # strings
    "{{ s.strip() }}|{{ s.lstrip() }}|{{ s.rstrip() }}|{{ s | trim }}",
    "{{ 'a</b>c</b>d'.split('</b>') | tojson }}{{ 'a,b,c'.split(',', 1) | tojson }}{{ ' a  b '.split() | tojson }}",
    "{{ 'aXbX'.replace('X', 'y') }}{{ 'aXbX'.replace('X', 'y', 1) }}{{ 'ab' | replace('', '-') }}",
    "{{ '<a href=\"x\">&\\'' | e }}",
    "{{ 'ab' * 3 }}{{ 'ab' * 0 }}{{ 'a' ~ 1 ~ true }}",
    "{{ x | indent(2) }}|{{ 'a\\nb\\n\\nc' | indent(3, true) }}",
    "{{ '10' < '9' }}{{ ['b', '10', 'a', '9'] | sort }}{{ '42' | int }}{{ '4x' | int }}{{ '2.5' | float }}{{ 'x' | float }}",
    # slices
    "{{ l[1:] }}{{ l[:-1] }}{{ l[::-1] }}{{ l[-2:] }}{{ l[10:] }}{{ l[:100] }}{{ l[::2] }}{{ l[3:0:-2] }}{{ l[-100:2] }}",
    "{{ 'héllo'[1:3] }}{{ 'hello'[::-1] }}{{ 'hello'[-3:] }}{{ 'hello'[1:-1:2] }}",
    "{{ '北京欢迎你'[::-1] }}{{ '北京欢迎你'[1:3] }}",
    # filters without arguments for tests
    "{{ [0, 1, '', 'a'] | select | list }}{{ [0, 1] | reject | list }}",
    "{{ ms | selectattr('role') | list | length }}{{ ms | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('; ') }}",
    "{{ ms | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first }}",
    # control
    "{% for m in ms %}{% if loop.last %}{% break %}{% endif %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(found=false) %}{% for m in ms %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}",
    "{% macro f(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ f(1) }} {{ f(1, b=3) }}",
    "{{ ['it\\'s', \"'\\\"\", 'a\\\\b', '北', '\u3000'] }}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}",
    "{{ none }}{{ none | trim }}{{ none ~ 'x' }}{{ missing }}{{ d.missing }}",
    "{{ none is none }}{{ missing is defined }}{{ x is string }}{{ d is mapping }}{{ 3 is odd }}",
]
DATA = {
    "x": "line one\nline two",
    "s": "\u3000 \t含 空格\u00a0\n",
    "l": [0, 1, 2, 3, 4],
    "d": {"name": "get", "args": {"z": 1, "a": [1, 2.5, True, None], "t": "<b>&'\"\n\u2028é", "e": {}, "f": 3.0}},
    "ms": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ],
}

env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
env.filters["tojson"] = tojson
cases = [{"template": t, "want": env.from_string(t).render(**DATA)} for t in TEMPLATES]
out = pathlib.Path(__file__).with_name("parity.json")
out.write_text(json.dumps({"data": DATA, "cases": cases}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
