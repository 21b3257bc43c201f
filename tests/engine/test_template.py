"""Chat templates: the same text as Hugging Face's, refusals with a reason, and limits that hold."""

import asyncio
import gc
import os
import signal
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.engine import template
from tenfold.engine.template import Renderer, TemplateError, apply, check_messages

USER = [{"role": "user", "content": "Hé, <b> & 'you'"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "  Yes?  "},
    {"role": "user", "content": "日本"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <&>", "parameters": {"a": [1, 2.5, None]}}}]

# Written for these tests with the constructs that templates of the served families use.
TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "brackets": """{{ bos_token }}{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content.strip() + '\n' %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{% set system = '' %}{%- endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{- '[INST] ' ~ (system if loop.first else '') ~ message.content | trim ~ ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}""",
    "tools": """{%- macro show(tool) -%}{{ tool | tojson }}|{{ tool.function | tojson(indent=2) }}{%- endmacro -%}
{% set ns = namespace(seen=0, last='') %}
{% if tools is defined and tools is not none %}{% for tool in tools %}{{ show(tool) }}
{% endfor %}{% endif %}
{% for m in messages[::-1] %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% set ns.seen = ns.seen + 1 %}{% set ns.last = m['content'] %}{% if ns.seen > 2 %}{% break %}{% endif %}
{{ m.content.split('</think>')[-1].lstrip('\n') | upper }}{% endfor %}
{{ ns.seen }} {{ ns.last | length }} {{ enable_thinking is defined and enable_thinking }} {{ documents is none }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | join(';') }}
{{ dict(a=1).items() | list }} {{ 'x' if pad_token is defined else 'no pad' }} {{ "%s-%d" | format('a', 3) }}
{%- if add_generation_prompt %}<answer>{% endif %}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", [{}, {"add_generation_prompt": False}, {"tools": TOOLS}, {"enable_thinking": False}])
def test_same_text_as_transformers(name, case):
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for chat in (CHAT, USER):
        call = {"add_generation_prompt": True, "tools": None, **case}
        [expected], _ = render_jinja_template([chat], chat_template=TEMPLATES[name], **call, **special)
        assert apply(TEMPLATES[name], chat, special=special, **case) == expected


def test_what_a_template_raises_reaches_the_user():
    with pytest.raises(TemplateError, match=r"^The chat template cannot be used: it says: Roles must alternate\.$"):
        apply(TEMPLATES["brackets"], [*USER, *USER])


def test_strftime_now():
    assert apply("{{ strftime_now('%Y') }}", USER) == time.strftime("%Y")


def test_default_templates():
    assert apply(template.default(True), CHAT[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé, <b> & 'you'<|im_end|>\n<|im_start|>assistant\n"
    )
    assert apply(template.default(False), CHAT) == (
        "Be brief.\n\nUser: Hé, <b> & 'you'\nAssistant:   Yes?  \nUser: 日本\nAssistant:"
    )


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continue_the_final_message_like_transformers(trim):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = "{% for m in messages %}<{{ m.role }}>{{ m.content" + trim + " }}</>{% endfor %}"
    for content in ("Yes, ", "Yes, and", " x \n"):
        chat = [*USER, {"role": "assistant", "content": content}]
        [expected], _ = render_jinja_template([chat], chat_template=source, continue_final_message=True)
        assert apply(source, chat, continue_final_message=True) == expected


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        ("x", USER, "needs a last message of role assistant"),
        ("x", [{"role": "assistant", "content": "a"}], "leaves the last message out"),
    ],
)
def test_what_cannot_be_continued(source, messages, reason):
    with pytest.raises(TemplateError, match=reason):
        apply(source, messages, continue_final_message=True)


def test_text_parts_are_joined_and_tool_arguments_parsed():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
    ]
    checked = check_messages(given)
    assert checked[0]["content"] == "a\nb"
    assert checked[1]["content"] == ""
    assert checked[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert checked[2]["tool_call_id"] == "1"
    assert given[1]["content"] is None, "the caller's messages stay as they are"
    assert given[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ("Hello", "messages is a str; allowed: a list"),
        ({"role": "user", "content": "x"}, "messages is a dict; allowed: a list"),
        (["Hello"], r"messages\[0\] is a str"),
        ([{"content": "x"}], r"messages\[0\].role is None; allowed: system, "),
        ([*USER, {"role": "wizard", "content": "x"}], r"messages\[1\].role is 'wizard'"),
        ([{"role": "user"}], r"messages\[0\].content is None; allowed: text"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5"),
        ([{"role": "user", "content": []}], r"messages\[0\].content is \[\]"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content is None"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\] is a part of type 'image_url', and this",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] is \{'type': 'text'\}"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], r"tool_calls\[0\] is \{\}"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\].function.arguments is not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 200_000}}]}],
            r"tool_calls\[0\].function.arguments is nested too deeply",
        ),
        ([{"role": "user", "content": "x", "extra": object()}], "not JSON serializable"),
    ],
)
def test_bad_messages_are_refused_with_their_place(messages, reason):
    with pytest.raises(TemplateError, match=reason):
        apply("x", messages)


@pytest.mark.real_model
def test_the_real_template_gives_the_same_text(smollm2_text):
    from transformers.utils.chat_template_utils import render_jinja_template

    for chat in (CHAT, USER):
        [expected], _ = render_jinja_template([chat], chat_template=smollm2_text.template, add_generation_prompt=True)
        assert smollm2_text.render_chat(chat) == expected
        assert smollm2_text.encode_chat(chat) == smollm2_text.encode(expected, add_special_tokens=False)
        assert smollm2_text.encode_chat(chat).count(smollm2_text.token_id("<|im_end|>")) == expected.count("<|im_end|>")


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages_", "bos_token"])
def test_settings_are_allow_listed(name):
    with pytest.raises(TemplateError, match=f"^{name} is not a setting of chat templates; allowed: .*enable_thinking"):
        apply("x", USER, **{name: True})


def test_oversized_templates_are_refused():
    with pytest.raises(TemplateError, match="has 262145 characters; allowed: up to 262144"):
        apply("x" * 262145, USER)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages[0]['content'] | attr('__class__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '%s' | attr('format') | attr('__self__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ open('/etc/passwd').read() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source):
    """Each is refused, or sees an undefined value and prints nothing of Python's insides."""
    try:
        text = apply(source, USER)
    except TemplateError as error:
        text = str(error)
        assert text.startswith("The chat template cannot be used: ")
    for sign in ("<class", "<function", "<module", "root:", "<built-in"):
        assert sign not in text


@pytest.fixture(scope="module")
def hasty():
    """A renderer with little time."""
    renderer = Renderer(seconds=0.3)
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def strict():
    """A renderer with little memory and room for output, and so much time that a crowded machine has enough, too."""
    renderer = Renderer(seconds=8, memory=1 << 26, max_output=10000)
    yield renderer
    renderer.close()


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "a loop in a loop": (LOOPS, "takes longer than"),
    "a huge range": ("{% for a in range(10**12) %}{% endfor %}", "Range too big"),
    "a string times a number": ("{{ 'a' * 10**10 }}", "more memory"),
    "a power": ("{{ (10 ** (10 ** 8)) > 1 }}", "takes longer than|more memory"),
    "a doubling string": (
        "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "more memory",
    ),
    "a list of itself twice": (
        "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "takes longer than|more memory",
    ),
    "a format width": ("{{ '%9999999999d' % 1 }}{{ '{:>9999999999}'.format(1) }}", "more memory|OverflowError|too big"),
    "a macro that calls itself": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "takes longer than",
    ),
    "much output": ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "output is longer than 10000"),
    "deep nesting": ("{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}", "calls itself without end"),
    "a slow comparison": (
        "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% if (s ~ 'b') in s %}{% endif %}{% endfor %}",
        "takes longer than",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_time(name, hasty, strict):
    source, reason = BOMBS[name]
    renderer = hasty if reason.startswith("takes") else strict
    start = time.monotonic()
    with pytest.raises(TemplateError, match=reason):
        renderer.render(source, {"messages": USER})
    assert time.monotonic() - start < 20, "that is the limit, and the rest for a crowded machine"
    assert renderer.render("{{ messages | length }}", {"messages": USER}) == "1", "the next one works"


@given(st.text("{%}|()[]'~*+. \nabfor inset=if1_#-", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_template_or_refused(source):
    with suppress(TemplateError):
        assert isinstance(apply(source, USER), str)


def test_a_template_is_sent_and_compiled_once(strict, monkeypatch):
    sent = []
    monkeypatch.setattr(template, "_pack", lambda request: sent.append("source" in request) or real(request))
    real = template.sandbox.pack
    source = "once {{ messages | length }}"
    assert [strict.render(source, {"messages": USER}) for _ in range(3)] == ["once 1"] * 3
    assert sent == [True, False, False]


def test_threads_and_event_loops_share_one_child(strict):
    answers = {}

    def work(n):
        for i in range(20):
            answers[n, i] = strict.render("{{ n }}-{{ i }}", {"n": n, "i": i})

    async def main():
        await asyncio.gather(*(asyncio.to_thread(work, n) for n in range(4)))

    asyncio.run(main())
    assert answers == {(n, i): f"{n}-{i}" for n in range(4) for i in range(20)}


def test_a_child_that_was_killed_is_started_again():
    renderer = Renderer()
    assert renderer.render("a", {}) == "a"
    os.kill(renderer._child.pid, signal.SIGKILL)
    renderer._child.wait()
    assert renderer.render("a", {}) == "a"
    renderer.close()


def test_a_child_killed_at_work_is_an_error():
    renderer = Renderer(seconds=30)
    renderer.render("a", {})
    timer = threading.Timer(0.2, os.kill, (renderer._child.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(TemplateError, match="its process ended with code -9"):
        renderer.render(LOOPS, {})
    timer.join()
    renderer.close()


def test_close_ends_the_child_and_dropping_the_renderer_does_too():
    renderer = Renderer()
    renderer.start()
    children = [renderer._child]
    renderer.close()
    renderer.start()
    children.append(renderer._child)
    del renderer
    gc.collect()
    assert all(child.returncode is not None for child in children)


def test_without_a_child_the_error_says_what_to_try(monkeypatch):
    renderer = Renderer()
    monkeypatch.setattr(template.sys, "path", [])
    with pytest.raises(TemplateError, match=r"did not start; try: .* -c 'import jinja2'"):
        renderer.render("a", {})
