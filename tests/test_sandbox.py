"""Templates in the sandbox: what is allowed gives what Jinja gives, and everything comes to an end.

python -m pytest tests/test_sandbox.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from template_programs import HOSTILE

from phi3_mlflow.runtime.sandbox import Sandbox

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "<think>a</think>\nb"},
    {"role": "assistant", "content": "1 < 2 & 'x'"},
]


def results(*seeds):
    """Name, seconds and result of each template, rendered in another process, which can be ended."""
    program = Path(__file__).with_name("template_programs.py")
    command = [sys.executable, "-W", "ignore", str(program), *map(str, seeds)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-500:] + ran.stderr[-2000:]
    return [line.split("\t") for line in ran.stdout.splitlines()]


def test_hostile_templates_come_to_an_end_in_one_line():
    found = results()
    assert [name for name, _, _ in found] == list(HOSTILE)
    for name, seconds, result in found:
        assert float(seconds) < 20, name
        assert 0 < len(result) < 300, name
        # An iterator hides what it gives, and gives it once.
        assert result != "whole" or name.startswith("iterators"), name


def test_random_templates_come_to_an_end():
    found = results(5300, 5700)  # 5457 compares two lists of 2^60 parts
    assert len(found) == 400
    assert all(float(seconds) < 20 for _, seconds, _ in found)
    ended = [result for _, _, result in found]
    assert ended.count("whole") > 50  # so not everything ends by an error of type
    assert ended.count("it asks for more work than a conversation needs") > 20


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index0 }}{{ m.role | upper }}{{ m['content'] | trim }}{% endfor %}",
        "{% for m in messages[1:] if m.role != 'user' %}{{ loop.last }}{{ m.content ~ '!' }}{% else %}none{% endfor %}",
        "{% for a, b in messages[0].items() %}{{ a }}={{ b }};{% endfor %}{{ messages[0] | items | list }}",
        "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + m | length %}{% endfor %}{{ n.a }}",
        "{{ messages[1].content.split('</think>')[-1].lstrip('\\n') }}{{ '</think>' in messages[1]['content'] }}",
        "{% macro m(a, b='x') %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, c=4) }}",
        "{% macro m() %}<{{ caller(1) }}>{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'eq', 'user') | list }}",
        "{{ messages | rejectattr('role', 'in', ['user', 'system']) | map(attribute='content') | first }}",
        "{% set x %}a{{ 1 + 2 * 3 // 2 - 4 % 3 }}{% endset %}{{ x | replace('a', 'b') }}{{ x == 'a3' }}{{ -1 }}",
        "{% if messages | selectattr('role', 'eq', 'nobody') %}an iterator is true{% endif %}",
        "{{ (messages[0].get('name', 'no'), messages.index(messages[1]), 'a,b'.split(','), ', '.join(['a', 'b'])) }}",
        "{% for i in range(9) %}{% if i is odd %}{% continue %}{% elif i > 5 %}{% break %}{% endif %}x{% endfor %}",
        "{{ missing is defined }}{{ messages.missing }}{{ messages[0]['missing'] }}{{ missing or 'else' }}{{ none }}",
        "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% with a = 1 %}{{ a if a else 2 }}{% endwith %}",
        "{{ [3, 1, 2] | sort | reverse | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ '3' | int + 1 }}{{ [1] + [2] }}",
        "{{ messages[2].content | e }}{{ 1 in [1, 2] }}{{ 'x' not in {'x': 1} }}{{ (1, 2) < (1, 3) }}{{ dict(a=1) }}",
        "{{ [] is sequence }}{{ {} is mapping }}{{ 'a' is string }}{{ 5 is divisibleby 5 }}{{ messages[::-1] }}",
    ],
)
def test_a_template_gives_what_it_gives_in_jinjas_own_sandbox(template):
    reference = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox = Sandbox()
    expected = reference.from_string(template).render(messages=MESSAGES)
    assert sandbox.render(sandbox.compiled(template), 200_000, messages=MESSAGES) == expected


def test_json_is_written_as_transformers_writes_it():
    sandbox = Sandbox()
    template = sandbox.compiled("{{ x | tojson }}{{ x | tojson(indent=2) }}{{ x | tojson(separators=(',', ':')) }}")
    written = '{"b": "<é>", "a": [1]}{\n  "b": "<é>",\n  "a": [\n    1\n  ]\n}{"b":"<é>","a":[1]}'
    assert sandbox.render(template, 2000, x={"b": "<é>", "a": [1]}) == written
