"""Chat templates: what strangers wrote, rendered as their library renders it, and never without an end."""

from __future__ import annotations

import time

import pytest

from linstate.engine.chat_template import ChatTemplate
from linstate.errors import InputError

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def render(source: str, messages=SAID, **options) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_generation_renders_its_body() -> None:
    source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    assert render(source) == "[hi]yes"


def test_loops_know_their_length_and_place() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}{{ loop.nextitem.content if loop.nextitem else '' }}{% endfor %}"
    assert render(source) == "1/2,yes2/2."
    assert (
        render("{% for k, v in messages[0]|items %}{{ k }}={{ v }};{% endfor %}") == "role=user;content=hi;"
    )
    assert (
        render("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}") == "hi"
    )
    assert (
        render("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}") == "02"
    )
    assert (
        render("{{ messages|map(attribute='content')|join('-') }} {{ 'a' * 3 }} {{ '%s!' % 'x' }}")
        == "hi-yes aaa x!"
    )
    assert (
        render("{{ {'b': 1, 'a': [2]}|tojson }} {{ ' x '|trim }} {{ 'ab'|indent(2, true) }}")
        == '{"b": 1, "a": [2]} x   ab'
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10**12) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 'a' * 10**11 }}",
        "{{ 'a' * 99999999999 }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{ 'a'.center(99999999999) }}",
        "{{ 'a'|center(99999999999) }}",
        "{{ 'a\nb'|indent(99999999999) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(t='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
        "{{ messages.__class__ }}{{ messages.append(1) }}",
        "{{ messages[7].content.x }}",
        "{% for m in messages",
        "{% nonsense %}",
        "{{ raise_exception('not so') }}",
    ],
)
def test_what_a_template_does_has_an_end(source: str) -> None:
    begin = time.monotonic()
    template = ChatTemplate(source, {})  # it stops no model from loading
    with pytest.raises(InputError, match="chat template"):
        template.render(SAID)
    assert time.monotonic() - begin < 30  # it would take hours, or the memory


def test_a_developer_speaks_as_the_system_where_the_template_knows_none() -> None:
    said = [{"role": "developer", "content": "be brief"}]
    assert render("{% for m in messages %}{{ m.role }}{% endfor %}", said) == "system"
    assert render("{% for m in messages %}{{ m.role }}{# developer #}{% endfor %}", said) == "developer"
