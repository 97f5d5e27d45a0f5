"""Templates that try to outgrow the sandbox, chosen or random; run as a program, it renders them.

python tests/template_programs.py [FIRST LAST] prints the name or the seed of each, the seconds it took and the result.
"""

import random
import resource
import sys
import time

# What takes one or two values and gives one; most of them grow what they are given.
_MAKE = """
    [{0}, {1}] | ({0}, {1}) | {{'x': {0}, 'y': {1}}} | dict(a={0}, b={1}) | {0} + {1} | {0} * 7 | [{0}] * 99 | {0} ~ {1}
    [{0}] + [{1}] | {0}[::-1] | {0}[:9999] | namespace(a={0}, b={1}) | {0}.a | {0}['x'] | {0}.items() | {0}.values()
    {0}.copy() | {0}.get('x', {1}) | {0}.index({1}) | {0}.count({1}) | {0}.join([{1}, {1}]) | {0}.replace('a', {1})
    {0}.split('a') | {0}.strip({1}) | {0}.rfind({1}) | {0}.upper() | {0}.title | ''.join({0}) | m({0}, {1}) | m({0})
    w({0}, {1}) | w(*{0}) | w(**{0}) | k(a={0}, b={1}) | {0} is in({1}) | {0} == {1} | {0} < {1} | {0} in {1}
    range(9999) | range({0}) | messages | messages[0] | n | n.p | n.q | {0} if {1} else {0} | {0} and {1} | -{0}
    {0} - {1} | {0} % {1} | {0} // 3 | {0} ** {1} | m | w | [m] * 999 | n.p is sameas {0} | {0} is odd | {0}.p
    {{ {0}: {1} }} | dict([({0}, {1})] * 99) | dict({0}) | {0}({1}) | {0}.isdisjoint({1}) | loop | loop.changed({0})
    loop.cycle({0}, {1}) | '%s%99999999d' % 1 | '{{0:99999999}}'.format({0}) | 1.5 | 99999999999 | ({0},) | 'a' * 9999
"""
_FILTERS = """
    string|list|tojson|sort|join|join('ab')|map('string')|map('join', 'ab')|map('list')|reverse|first|last|length|upper
    safe|escape|default(n.p)|dictsort|items|max|min|select|select('in', n.p)|reject('eq', n.q)|replace('a', n.p)
    replace('', 'abc')|trim|trim('a')|int|float|tojson(indent=9)|map(attribute='a')|map(attribute='a.a.a.a.a')
    map(attribute=0)|selectattr('a', 'eq', n.p)|rejectattr('a')|sort(attribute='a,a,a')|title|capitalize|lower|list|list
"""
MAKE = [part.strip() for line in _MAKE.strip().splitlines() for part in line.split(" | ")]
FILTERS = [part.strip() for line in _FILTERS.strip().splitlines() for part in line.split("|")]
LEAVES = ("n.p", "n.p", "n.p", "n.q", "a", "'ab'", "[1]", "1", "{'x': 1}", "messages", "m", "[]", "''")


def program(seed: int) -> str:
    """A template that makes a value anew again and again, and uses it once: an error of type would end it at once."""
    choose = random.Random(seed)

    def value(depth: int) -> str:
        if depth == 0:
            return choose.choice(LEAVES)
        if choose.random() < 0.3:
            return f"({value(depth - 1)} | {choose.choice(FILTERS)})"
        shape = choose.choice(MAKE[:15] if choose.random() < 0.6 else MAKE)
        return f"({shape.format(value(depth - 1), value(depth - 1))})"

    def grow() -> str:
        target, grown = choose.choice(("n.p", "n.p", "n.p", "n.q")), value(choose.choice((1, 1, 2)))
        return choose.choice(
            [f"{{% set {target} = {grown} %}}"] * 8
            + [
                f"{{% set {target} %}}{{{{ {grown} }}}}{{{{ n.p }}}}{{% endset %}}",
                f"{{% call m({grown}) %}}{{% set {target} = n.p %}}{{{{ n.p }}}}{{% endcall %}}",
                f"{{% for b in {grown} %}}{{% set {target} = [n.p, b] %}}{{% endfor %}}",
            ]
        )

    start = choose.choice(("[1]", "'ab'", "(1, 2)", "{'a': 1}", "7", "range(99)"))
    steps = "".join(grow() for _ in range(choose.choice((1, 1, 2))))
    times = choose.choice((1, 3, 60, 60, 60, 9999))
    use = choose.choice((f"{{{{ {value(1)} }}}}", f"{{% if {value(1)} %}}{{% endif %}}", "{{ n.p == n.q }}"))
    return (
        f"{{% set n = namespace(p={start}, q={choose.choice(LEAVES[5:])}) %}}{{% set a = n.p %}}"
        f"{{% macro m(x, y) %}}{{{{ x }}}}{{{{ caller() if caller else y }}}}{{% endmacro %}}"
        f"{{% macro w() %}}{{% set n.p = varargs %}}{{% endmacro %}}{{% macro k() %}}{{% set n.q = kwargs %}}"
        f"{{% endmacro %}}{{% for i in range({times}) %}}{steps}{{% endfor %}}{use}"
    )


# Two values, in each of which the same one is 2^60 times, and what goes through them.
_DOUBLED = {
    "lists": "[n.p, n.p]",
    "tuples": "(n.p, n.p)",
    "dicts": "{'x': n.p, 'y': n.p}",
    "dicts by the function": "dict(x=n.p, y=n.p)",
    "lists by +": "[n.p] + [n.p]",
    "lists by *": "[n.p] * 2",
    "lists by a filter": "[n.p, n.p] | map('default') | list",
    "iterators": "[n.p, n.p] | select('defined')",
    "views": "dict(x=n.p, y=n.p).values()",
}
_USES = """
    {{ n.p }}; {{ n.p == n.q }}; {{ n.p < n.q }}; {{ n.p in [n.q] }}; {{ n.p ~ 'a' }}; {{ n.p | string }}; {{ -n.p }}
    {{ n.p | tojson }}; {{ {n.p: 1} }}; {{ [n.p, n.q] | sort }}; {{ [n.p] | unique | list }}; {{ n.p | join }}
    {{ n.p | pprint }}; {{ n.p is eq n.q }}; {{ [n.p].index(n.q) }}; {{ [n.p].count(n.q) }}; {{ [n.p, n.q] | max }}
    {% for i in 'ab' %}{{ loop.changed(n.p) }}{% endfor %}; {{ raise_exception(n.p) }}; {{ {1: 2}[n.p] }}
"""
_START = "{% set n = namespace(p=(1,), q=(1,)) %}"
_MACROS = {
    "arguments": "{% macro m() %}{% set n.p = varargs %}{% endmacro %}{% for i in range(60) %}{{ m(n.p, n.p) }}"
    "{% set n.q = n.p %}{% endfor %}{{ n.p == n.q }}",
    "named arguments": "{% macro m() %}{% set n.p = kwargs %}{% endmacro %}{% for i in range(60) %}"
    "{{ m(a=n.p, b=n.p) }}{% set n.q = n.p %}{% endfor %}{{ n.p == n.q }}",
    "a macro that hands on": "{% macro m() %}{{ m(*varargs) }}{{ m(*varargs) }}{% endmacro %}{{ m(1, 2) }}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 15 + "x" + "{% endcall %}" * 15,
    "macros that show their name": f"{{% macro {'m' * 30_000}() %}}{{% endmacro %}}{{% for i in range(9999) %}}"
    f"{{{{ [{'m' * 30_000}] * 9999 }}}}{{% endfor %}}",
    "deep tuples": "{% for i in range(9999) %}{% set n.p = (n.p,) %}{% endfor %}{{ {1: 2}[n.p] }}",
    "a namespace in itself": "{% set n.n = n %}{% set n.p = [n] * 9999 %}{{ n.p | map(attribute='"
    + "n." * 9999 + "p') | list }}",
    "tuples of one hash": "{% set t = (" + ",".join(f"({i},{i * 7})" for i in range(500)) + ") %}"
    "{% for a in t %}{% for b in t %}{% set n.p = {(a, b): 1} %}{% endfor %}{% endfor %}",
    "a dict of tuples": "{{ dict([((1, 2), 3)]) }}",
    "a format in a test": "{{ '%999999999d' is odd }}",
    "digits to round to": "{{ 1.5 | round(999999999, 'floor') }}",
    "a number to round": "{{ 5 | round(-999999999) }}",
    "a budget of its own": "{{ range(9999) | passes(-999999) | list }}{{ range(9999) | paid | list }}",
    "what to strip": "{{ ('\u0161' * 9999).strip('\u0261' * 9999) }}",
    "what to find from the end": "{{ ('a' * 9999).rfind('a' + 'b' + 'a' * 4999) }}",
    "blocks": "{% block a %}{% endblock %}",
    "escapes": "{% autoescape true %}{{ n.p }}{% endautoescape %}",
    "a long source": "x" * 70_000,
    "deep brackets": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "deep statements": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for a in 'a' %}" * 30 + "{% endfor %}" * 30,
    "deep calls": "{% macro m(i) %}{{ m(i + 1) }}{% endmacro %}{{ m(1) }}",
    "many nots": "{{ " + "not " * 15_000 + "1 }}",
    "many signs": "{{ " + "-" * 60_000 + "1 }}",
    "many attributes": "{{ a" + ".a" * 30_000 + " }}",
    "many filters": "{{ a" + "|list" * 12_000 + " }}",
    "many digits": "{{ " + "9" * 60_000 + " }}",
    "many operators": "{{ 1" + "+1" * 30_000 + " }}",
}  # fmt: skip
HOSTILE = {
    f"{name}: {use}": f"{_START}{{% for i in range(60) %}}{{% set n.p = {doubled} %}}"
    f"{{% set n.q = {doubled.replace('n.p', 'n.q')} %}}{{% endfor %}}{use}"
    for name, doubled in _DOUBLED.items()
    for use in (use.strip() for line in _USES.strip().splitlines() for use in line.split("; "))
} | {name: _START + template for name, template in _MACROS.items()}


def main(*seeds: int) -> None:
    """Renders the templates of some seeds, or the hostile ones, in 2 GiB."""
    import jinja2

    from phi3_mlflow.runtime.sandbox import Sandbox

    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}] * 20
    templates = {str(seed): program(seed) for seed in range(*seeds)} if seeds else HOSTILE
    for name, template in templates.items():
        sys.stdout.write(f"{name}\t")
        sys.stdout.flush()
        start, result = time.process_time(), "whole"
        sandbox = Sandbox()
        try:
            sandbox.render(sandbox.compiled(template), 100_000, messages=turns, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            result = str(error)
        sys.stdout.write(f"{time.process_time() - start:.2f}\t{result}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
