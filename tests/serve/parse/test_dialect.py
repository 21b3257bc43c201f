import pytest

from tenfold.serve.parse.dialect import dialect_for

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CASES = [
    ("", "{% for m in messages %}{{ m.content }}{% endfor %}", "generic"),
    ("Qwen3", TOOLS + "<tool_call>\\n{{ call }}</tool_call>", "hermes"),
    ("Qwen3", TOOLS + "<tool_call>\\n<function=x>\\n<parameter=y>", "qwen-xml"),
    ("Llama", TOOLS + "Environment: ipython", "llama"),
    ("Mistral", TOOLS + "[TOOL_CALLS] [", "mistral-list"),
    ("Mistral", TOOLS + "[TOOL_CALLS]{{ name }}[ARGS]", "mistral"),
    ("Llama", TOOLS + "<tool_call>", "hermes"),  # a Hermes model of Llama's architecture
    ("Phi3", "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}", "phi"),
    ("Qwen2", TOOLS + "<｜tool▁calls▁begin｜> ```json", "deepseek"),
    ("Qwen2", TOOLS, "hermes"),
    ("Unknown", TOOLS, "json"),
    ("Gemma3", "{{ '<start_of_turn>' }}", "generic"),
]


@pytest.mark.parametrize(("family", "template", "name"), CASES)
def test_the_template_decides_and_the_family_breaks_ties(family, template, name):
    dialect = dialect_for(family, template)
    assert dialect.name == name
    assert "template" in dialect.why


def test_reasoning_is_known_from_the_template_or_the_vocabulary():
    assert dialect_for("", "x.split('</think>')").think == ("<think>", "</think>")
    assert dialect_for("", "x", ["<think>", "</think>"]).think == ("<think>", "</think>")
    assert dialect_for("", "[/THINK]").think == ("[THINK]", "[/THINK]")
    assert dialect_for("", "x", ["<s>"]).think is None
