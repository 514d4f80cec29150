"""render_chat against transformers, on templates in the manner of ChatML, Llama 3 and Qwen3 written for this test."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from trimkv_export.errors import MissingDependencyError, OptionError
from trimkv_export.text.chat import render_chat, require_variables

CHATML = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
  {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
  {% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\\n" }}{% endfor %}{% endif %}
{{- system + eos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('roles must be user or assistant, not ' + message.role) }}
    {%- endif %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' }}
    {%- if message.content is string %}{{ message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{ '<|image|>' }}{% else %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last_query=-1, self=1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set ns.last_query = messages | length - 1 - loop.index0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content | default('') %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last_query %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}
        {{- content }}{% set content = 'not seen outside' %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + dict(name=call.name, arguments=call.arguments) | tojson(sort_keys=true) }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {%- endgeneration %}
        {{- '<|im_end|>\\n' }}{% if content == 'not seen outside' %}leaked{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

TOOL = {"type": "function", "function": {"name": "größe", "description": "a < b && 'c' > \"d\"", "list": [1, 2.5]}}
PLAIN = [
    {"role": "system", "content": "  Short answers. "},
    {"role": "user", "content": "<b>Hi</b> & \u00e9\U0001f600"},
    {"role": "assistant", "content": "<think>\nA\n</think>\n\nHello."},
    {"role": "user", "content": "Again?\n"},
]
CALLS = [
    {"role": "user", "content": "How big?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Ask.",
        "tool_calls": [{"name": "größe", "arguments": {}}],
    },
    {"role": "tool", "content": "7"},
]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "messages", "kwargs"),
    [
        (CHATML, PLAIN, {}),
        (CHATML, PLAIN[1:], {}),
        (LLAMA3, PLAIN, {"bos_token": "<s>", "eos_token": "</s>"}),
        (LLAMA3, PLAIN, {"bos_token": "<s>", "eos_token": "</s>", "tools": [TOOL], "date_string": "26 Jul 2024"}),
        (LLAMA3, PARTS, {"bos_token": "<s>", "eos_token": "</s>"}),
        (LLAMA3, CALLS, {"eos_token": "</s>"}),
        (QWEN3, PLAIN, {}),
        (QWEN3, PLAIN, {"enable_thinking": False}),
        (QWEN3, CALLS, {"tools": [TOOL], "enable_thinking": True}),
        (QWEN3, [], {}),
    ],
)
def test_a_chat_is_rendered_as_by_transformers(
    template: str, messages: list[dict[str, Any]], kwargs: dict[str, Any], add_generation_prompt: bool
) -> None:
    rendered = render_chat(template, messages, add_generation_prompt=add_generation_prompt, **kwargs)
    expected, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **kwargs
    )
    assert rendered == expected[0]
    assert "leaked" not in rendered


def test_a_token_that_the_tokenizer_lacks_is_undefined() -> None:
    assert render_chat("{{ bos_token }}{{ eos_token is defined }}|{{ tools is none }}", []) == "False|True"


def test_objects_are_hidden_from_the_template() -> None:
    class Name(str):
        __slots__ = ()

    class Count(int):
        pass

    class Size(float):
        pass

    message = {"content": object(), "role": Name("user"), "n": (Count(3), [Size(2.5), True, None])}
    rendered = render_chat("{{ messages[0] }}", [message])
    assert rendered == "{'content': '<object>', 'role': 'user', 'n': (3, [2.5, True, None])}"


def test_a_refusal_of_the_template_is_reported() -> None:
    with pytest.raises(OptionError, match="roles must be user or assistant, not critic"):
        render_chat(LLAMA3, [{"role": "critic", "content": "x"}], eos_token="</s>")  # noqa: S106


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "not valid"),
        ("{% for x in y %}", "not valid"),
        ("{{ messages[0]['role'] + 1 }}", "failed: TypeError"),
        ("{{ undefined.attribute }}", "failed: UndefinedError"),
        ("{{ messages.append(1) }}", "failed: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "failed: SecurityError"),
        ("{{ dict.mro() }}", "failed: UndefinedError"),
        ("{% set ns = namespace(__class__=1) %}", "failed: SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "failed: SecurityError"),
        ("{{ range(1000000000) }}", "failed: OverflowError"),
    ],
)
def test_a_bad_template_is_reported(template: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"the chat template (is )?{message}"):
        render_chat(template, [{"role": "user", "content": "x"}])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trimkv-export\[runtime\]'"):
        render_chat("a template that no test has used", [])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 10**5000 }}",
        "{{ 10**(10**10) }}",
        "{% set x = 'a' * 10000000000 %}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:{w}}'.format(1, w=1000000000) }}",
        "{{ ('a' * 1000000) | wordwrap(1) }}",
        "{{ ('a' * 1000000) | wordwrap }}",
        "{{ [1] | slice(999999) | list | length }}",
        "{{ ('{0:>99999}' * 20000).format('a') }}",
        "{{ ('{:{w}}' * 20000).format(*range(20000), w=99999) }}",
        "{{ ('%(a)99999d' * 20000) % {'a': 1} }}",
        "{{ ('%*d' * 10000) % ((99999, 1) * 10000) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% set n = namespace(a=['x']) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
        "{% set n = namespace(a='xx') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "{% set n = namespace(a='xx') %}{% for i in range(60) %}{% set n.a = n.a | replace('x', n.a) %}{% endfor %}",
        "{% set n = namespace(a='xx') %}{% for i in range(60) %}{% set n.a = [n.a, n.a] | join %}{% endfor %}",
        "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}"
        "{% set n.b = (n.b, n.b) %}{% endfor %}{{ n.a == n.b }}",
        "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
        "{{ (range(99999) | map('string')) | join(',' * 99999) }}",
        "{{ ('\n' * 99999) | indent(99999) }}",
        "{{ messages | tojson(indent=100000000) }}",
        "{{ 'x'.zfill(99999999) }}",
        "{{ lipsum(1000000) }}",
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "+".join(["1"] * 5_000) + " }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% include 'x' %}",
    ],
)
def test_a_hostile_template_ends_with_an_error(source: str) -> None:
    with pytest.raises(OptionError, match=r"the chat template (is not valid|failed): .{1,300}$"):
        render_chat(source, [{"role": "user", "content": "x"}])


def test_a_conversation_may_be_long() -> None:
    """What a template may do grows with the conversation."""
    turns = [{"role": role, "content": f"{number} " * 200} for number in range(500) for role in ("user", "assistant")]
    assert len(render_chat(QWEN3, turns)) > 500_000
    text = [{"role": "user", "content": "word " * 1_000_000}]
    assert len(render_chat(CHATML, text)) > 5_000_000


def test_ordinary_text_is_wrapped() -> None:
    written = render_chat(
        "{{ messages[0].content | wordwrap(20) }}", [{"role": "user", "content": "a few words " * 9000}]
    )
    assert {len(line) for line in written.splitlines()} <= {*range(21)}


def test_templates_in_several_threads() -> None:
    """The count is of one rendering, also where several are under way."""
    source = "{% for m in range(500) %}{{ messages[0].content }}{% endfor %}"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: render_chat(source, [{"content": str(n)}]), range(40)))
    assert found == [str(n) * 500 for n in range(40)]


def test_deep_messages_are_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(OptionError, match="the chat template failed: RecursionError"):
        render_chat(CHATML, [{"role": "user", "content": deep}])


def test_variables_that_would_do_nothing() -> None:
    require_variables(QWEN3, {"enable_thinking": False, "tools": []})
    for name, said in (("enable_thinkin", "has no variable 'enable_thinkin'"), ("messages", "set by this program")):
        with pytest.raises(OptionError, match=said):
            require_variables(QWEN3, {name: 1})
    require_variables(LLAMA3, {"date_string": "today"})
    with pytest.raises(OptionError, match="is not valid"):
        require_variables("{% if %}", {"x": 1})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}", ""),
        ("{{ 'a' + messages[0].content + 'b' }}{{ 'c' ~ messages[0].content }}", "abc"),
        ("[{{ messages[0]['content'] | trim }}]", "[]"),
        ("{% if messages[0].content is none %}calls{% endif %}", "calls"),  # DeepSeek looks for it
        ("{% if messages[0].content is not none %}says{% endif %}", ""),
        ("{% if messages[0].content is string %}says{% else %}calls{% endif %}", "calls"),
        ("{% if messages[0].content == none %}calls{% endif %}{{ messages[0].content or 'nothing' }}", "callsnothing"),
        ("{% for part in messages[0].content %}{{ part }}{% endfor %}.", "."),
        ("{{ messages[0] | tojson }}", '{"role": "assistant", "content": null}'),
        ("{{ messages[0].content is defined }} {{ messages[0].content is iterable }}", "True False"),
        ("{{ messages[0].other }}{{ none }}", "None"),  # what is no message's is as Jinja has it
    ],
)
def test_a_message_that_says_nothing(template: str, expected: str) -> None:
    """As a call of tools does; it is never the word None."""
    assert render_chat(template, [{"role": "assistant", "content": None}]) == expected
