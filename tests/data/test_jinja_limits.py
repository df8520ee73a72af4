"""A template of somebody else's takes little time and memory, gives the same text every time, and ends in one line."""

import subprocess
import sys
import time

import pytest

from alignjax.data import jinja_account
from alignjax.data.jinja_template import JinjaTemplate
from alignjax.errors import InputError

DIALOGUE = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]

TOO_MUCH = {
  # of numbers
  "a power, never rendered": "{% if false %}{{ 9**(9**9) }}{% endif %}{{ 9**(9**9) }}",
  "a power": "{{ 9 ** (9 ** 9) }}",
  "a power in a comparison": "{% if 9**(9**9) > 1 %}a{% endif %}",
  "a power in a set": "{% set x = 9**(9**9) %}",
  "a power in an option": "{% autoescape 9**(9**9) %}a{% endautoescape %}{{ 9**(9**9) }}",
  "products": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
  "a filter of a power": "{{ [9]|map('round', 2, 'floor')|first }}{{ 1.5|round(10**9, 'floor') }}",
  "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
  # of texts
  "a text many times": "{{ 'a' * 10**9 }}",
  "many times a text": "{{ 10**9 * 'a' }}",
  "a list many times": "{{ [1] * 10**9 }}",
  "a tuple many times": "{{ (1, 2) * 10**9 }}",
  "an escaped text many times": "{{ ('a'|e) * 10**9 }}",
  **{
    f"doubling {name}": "{% set ns = namespace(x='ab', y=[1]) %}{% for i in range(99) %}" + body + "{% endfor %}"
    for name, body in {
      "by +": "{% set ns.x = ns.x + ns.x %}",
      "by ~": "{% set ns.x = ns.x ~ ns.x %}",
      "a list": "{% set ns.y = ns.y + ns.y %}",
      "by join": "{% set ns.x = [ns.x, ns.x]|join %}",
      "by %": "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
      "by a block": "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
      "by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns.x = f(ns.x) %}",
      "by a filter": "{% set ns.x = ns.x|replace(ns.x, ns.x ~ ns.x) %}",
    }.items()
  },
  "center": "{{ 'a'|center(10**9) }}",
  "center, never rendered": "{% if false %}{{ 'a'|center(10**9) }}{% endif %}{{ 'a'|center(10**9) }}",
  "center of a text": "{{ 'a'.center(10**9) }}",
  "center of an escaped text": "{{ ('a'|e).center(10**9) }}",
  "ljust": "{{ 'a'.ljust(10**9) }}",
  "zfill": "{{ 'a'.zfill(10**9) }}",
  "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
  "map of center": "{{ ['a']|map('center', 10**9)|list }}",
  "indent": "{{ 'a\\nb'|indent(10**9) }}",
  "indent by a text": "{{ ('\\n' * 10**6)|indent('a' * 10**6) }}",
  "batch": "{{ [1]|batch(10**9, 0)|list }}",
  "slice": "{{ [1]|slice(10**9)|list }}",
  "percent": "{{ '%1000000000d' % 1 }}",
  "percent by a filter": "{{ '%1000000000d'|format(1) }}",
  "percent by a star": "{{ '%*d' % (10**9, 1) }}",
  "percent of precision": "{{ '%.1000000000f' % 1.5 }}",
  "format": "{{ '{:1000000000d}'.format(1) }}",
  "format of a width given": "{{ '{:{}d}'.format(1, 10**9) }}",
  "format many times": "{{ ('{0}' * 10**6).format('a' * 10**6) }}",
  "format by attr": "{{ ('{:1000000000d}'|attr('format'))(1) }}",
  "format_map": "{{ '{x:1000000000d}'.format_map({'x': 1}) }}",
  "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
  "replace by nothing": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
  "replace by a filter": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
  "join": "{{ ('a' * 10**6).join(range(100000)|map('string')) }}",
  "join by a filter": "{{ range(100000)|join('a' * 10**6) }}",
  "split": "{{ ('a ' * 10**7).split(' ') }}",
  "words of a text": "{{ ('a ' * 10**6)|wordcount }}",
  "a list of a text": "{{ ('a' * 10**7)|list }}",
  "tojson": "{{ {'a': 1}|tojson(indent=10**9) }}",
  "tojson with separators": "{{ [1, 2]|tojson(separators=('a' * 10**7, ':')) }}",
  "strftime": "{{ strftime_now('%1000000000Y') }}",
  # of loops and calls
  "a range": "{{ range(10**9)|list }}",
  "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}" + "{% endfor %}" * 3,
  "loops with text": "{% for a in range(9999) %}{% for b in range(9999) %}" + "a" * 999 + "{% endfor %}{% endfor %}",
  "a loop over one that is recursive": "{% for a in [range(99999)] recursive %}{% if a is iterable %}"
  "{% for b in range(999) %}{{ loop(range(99999)) }}{% endfor %}{% endif %}{% endfor %}",
  "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
  "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "lazy filters": "{% for a in range(9999) %}{% set x = range(99999)|map('string')|map('upper')|list %}{% endfor %}",
  "sums of lists": "{{ (range(99999)|map('list')|list)|sum(start=[]) }}",
  # of values that hold one another
  **{
    f"a tree {name}": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}" + use
    for name, use in {
      "written": "{{ ns.x }}",
      "as JSON": "{{ ns.x|tojson }}",
      "as text": "{{ ns.x|string|length }}",
      "joined": "{{ ns.x|join }}",
      "compared": "{{ ns.x == ns.y }}",
      "looked for": "{{ ns.x in [ns.y] }}",
      "looked for by a method": "{{ [ns.y].index(ns.x) }}",
      "tested": "{{ ns.x is eq(ns.y) }}",
      "formatted": "{{ '%s' % (ns.x,) }}",
      "formatted by a method": "{{ '{}'.format(ns.x) }}",
      "sorted": "{{ [ns.x, ns.y]|sort }}",
      "concatenated": "{{ ns.x ~ 'a' }}",
    }.items()
  },
  "a tree as a key": "{% set ns = namespace(x=(1,)) %}{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
  "{{ {ns.x: 1} }}",
  "deep JSON": "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}"
  "{{ ns.x|tojson }}",
  # of the compiler
  "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
  "lists in lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
  "sums": "{{ 1" + " + 1" * 20_000 + " }}",
  "nots": "{{ " + "not " * 5000 + "1 }}",
  "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
  "fors": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
  "a number of many digits": "{{ " + "9" * 5000 + " }}",
  "ten megabytes": "a" * 10_000_000,
  "its own words": "{{ raise_exception('a\\n' * 10**6) }}",
}


@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_takes_too_much_ends_in_one_line_soon(source, monkeypatch):
  monkeypatch.setattr(jinja_account, "STEPS", 100_000)  # a tenth, for the tests' sake
  monkeypatch.setattr(jinja_account, "ROOM", 16_000_000)
  begin = time.thread_time()
  with pytest.raises(InputError) as caught:
    JinjaTemplate(source, {}).render(DIALOGUE)
  assert len(str(caught.value)) < 700
  assert "\n" not in str(caught.value)
  assert time.thread_time() - begin < 8


def test_what_is_never_rendered_costs_nothing():
  text = "{% if false %}{{ 9**(9**9) }}{{ 'a'|center(10**9) }}{{ 'a' * 10**9 }}{% endif %}a"
  assert JinjaTemplate(text, {}).render(DIALOGUE).text == "a"


def test_seconds_are_limited_where_steps_are_few(monkeypatch):
  monkeypatch.setattr(jinja_account, "SECONDS", 0.01)
  slow = "{% set x = 'a' * 10**6 %}{% for a in range(9999) %}{% if 'b' in x and 'c' in x %}{% endif %}{% endfor %}"
  with pytest.raises(InputError, match=r"more than 0\.01 seconds"):
    JinjaTemplate(slow, {}).render(DIALOGUE)


DIFFERS = {
  "a choice": "{{ [1, 2, 3]|random }}",
  "filler": "{{ lipsum() }}",
  "a mapped choice": "{{ [[1, 2]]|map('random')|list }}",
  "a function": "{{ raise_exception }}",
  "a range's maker": "{{ range }}",
  "a method": "{{ 'a'.upper }}",
  "a method in a list": "{{ ['a'.upper] }}",
  "a method joined": "{{ 'a' ~ 'a'.upper }}",
  "a method formatted": "{{ '%s' % 'a'.upper }}",
  "a method as text": "{{ 'a'.upper|string }}",
  "a lazy filter": "{{ [1]|map('string') }}",
  "the time zone": "{{ strftime_now('%s %Z') }}",
  "the locale": "{{ strftime_now('%c') }}",
}


@pytest.mark.parametrize("source", DIFFERS.values(), ids=DIFFERS)
def test_what_differs_from_call_to_call_is_refused(source):
  with pytest.raises(InputError):
    JinjaTemplate(source, {}).render(DIALOGUE)


def test_what_templates_use_works_as_in_jinja():
  """Against a plain environment, in one process and in another with other hashes."""
  parts = {
    "{{ messages|map(attribute='role')|join(', ') }}": "user, assistant",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "1",
    "{{ ('%s-%5.2f' % ('a', 1.5)) ~ 'b' }}{{ '{:>4}|{x}'.format('a', x=2) }}": "a- 1.50b   a|2",
    "{{ 'a,b'.split(',')[1].upper().center(5) }}|{{ 'a'|center(3) }}": "  B  | a ",
    "{{ {'b': [1, 'ä', None], 'a': {'c': 1.5}}|tojson }}": '{"b": [1, "ä", null], "a": {"c": 1.5}}',
    "{{ {'b': [1]}|tojson(indent=2) }}": '{\n  "b": [\n    1\n  ]\n}',
    "{{ [3, 1, 2]|sort|join }}{{ (2 ** 10) // 3 % 7 }}{{ 7 / 2 }}": "12353.5",
    "{{ {'a': 1, 'b': [2, 'x']} }}{{ (1,) }}{{ none }}{{ true }}": "{'a': 1, 'b': [2, 'x']}(1,)NoneTrue",
    "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f('a') }}": "<a>",
    "{% for a in range(5) if a % 2 %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}": (
      "1/2,2/2"
    ),
    "{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}": "123",
    "{% for m in messages[::-1] %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}": "hello",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 5 %}{% endfor %}{{ ns.n }}": "10",
    "{{ strftime_now('%d %B %Y') }} {{ strftime_now('%-d %b') }}": "26 July 2024 26 Jul",
    "{{ 'x' if messages[0]['role'] == 'user' and 'l' in messages[0].content }}{{ y }}{{ 'a' not in 'b' }}": "xTrue",
    "{{ messages[0].items()|list }}": "[('role', 'user'), ('content', 'hello')]",
    "{{ 'a\nb'|indent(2) }}{{ 'ab'|replace('a', 'c') }}{{ '  a '|trim }}{{ 'aXb'.replace('X', '-') }}": "a\n  bcba"
    + "a-b",
    "{{ messages|groupby('role')|map('first')|join(' ') }}{{ [1, 2, 1]|unique|list }}": "assistant user[1, 2]",
    "{{ [[1, 2], [3]]|map('sum')|list }}{{ range(3)|sum }}{{ 2.345|round(1) }}": "[3, 3]32.3",
    "{% filter upper %}a{% endfilter %}{% set x %}b{{ 1 }}{% endset %}{{ x }}": "Ab1",
    "{% call(y) f() %}{{ y }}{% endcall %}{% macro f() %}({{ caller(3) }}){% endmacro %}": "(3)",
  }
  for source, text in parts.items():
    if "f()" in source:
      source = source[source.index("{% macro") :] + source[: source.index("{% macro")]
    assert JinjaTemplate(source, {}).render(DIALOGUE).text == text, source


def test_a_long_dialogue_is_rendered():
  source = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content|trim }}{{ m.content.split('</x>')[-1][:3] }}{% endfor %}"
  )
  long = [{"role": "user", "content": "word " * 2_000_000}]
  assert len(JinjaTemplate(source, {}).render(long).text) > 9_000_000
  many = [{"role": "user", "content": "hello"}] * 20_000
  assert JinjaTemplate(source, {}).render(many).text.count("<user>") == 20_000


@pytest.mark.slow
def test_a_text_is_the_same_in_a_process_with_other_hashes():
  source = (
    "{{ messages|map(attribute='role')|unique|list }}{{ {'b': 1, 'a': 2}|dictsort }}{{ messages[0] }}{{ none|string }}"
  )
  program = (
    "from alignjax.data.jinja_template import JinjaTemplate; import sys;"
    f"print(JinjaTemplate(sys.argv[1], {{}}).render({DIALOGUE!r}).text)"
  )
  there = subprocess.run([sys.executable, "-c", program, source], capture_output=True, text=True, check=True).stdout
  assert there == JinjaTemplate(source, {}).render(DIALOGUE).text + "\n"
