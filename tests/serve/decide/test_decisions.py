"""POST /v1/decisions: what a model says becomes probabilities, with what it says anyway taken out."""

import json
import re

import pytest

COLOURS = {"red": 0.6, "green": 0.3, "blue": 0.1}
CHOICE = {"type": "choice", "name": "c", "instructions": "Which?", "choices": [{"value": name} for name in COLOURS]}
PREDICATE = {"type": "predicate", "instructions": "It is late."}
SCORE = {"type": "score", "instructions": "How good?", "levels": [{"label": x} for x in ("bad", "fair", "good")]}


def decide(client, questions, **fields):
    response = client.post("/v1/decisions", {"input": "The sky.", "questions": questions} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def shown(text):
    """Label to option, as a prompt lists them."""
    return dict(re.findall(r"^([A-Z][0-9]?): (.*)$", text, re.MULTILINE))


def colours(text, place_bias=1.0, own_bias=None):
    """The weights of COLOURS, more of the first place, and times `own_bias` of a colour whatever the input."""
    informed = "The sky." in text
    weights = {}
    for place, (label, name) in enumerate(shown(text).items()):
        weights[label] = (COLOURS[name] if informed else 1.0) * (place_bias if place == 0 else 1.0)
        weights[label] *= (own_bias or {}).get(name, 1.0)
    return weights


def probabilities(answer):
    return {entry["value"]: entry["probability"] for entry in answer["probabilities"]}


def test_choice(ask):
    client, _ = ask(colours)
    body = decide(client, [CHOICE])
    (answer,) = body["answers"]
    assert probabilities(answer) == pytest.approx(COLOURS)
    assert (answer["type"], answer["name"], answer["choice"]) == ("choice", "c", "red")
    assert answer["confidence"] == pytest.approx(0.6)
    assert body["model"] == "tiny"


def test_spellings_of_a_label_add_up(ask):
    client, _ = ask(lambda text: {"Yes": 0.1, " yes": 0.2, "NO": 0.05, "No": 0.05, "A": 9.0})
    (answer,) = decide(client, [PREDICATE], calibrate=False)["answers"]
    assert answer == {"type": "predicate", "name": None, "probability": pytest.approx(0.75)}


def test_order_of_answers_and_words_of_a_predicate(ask):
    client, llm = ask(lambda text: {"Yes": 1.0, "No": 1.0, **dict.fromkeys("ABC", 1.0)})
    body = decide(client, [PREDICATE, CHOICE, SCORE], calibrate=False)
    assert [a["type"] for a in body["answers"]] == ["predicate", "choice", "score"]
    assert any("Yes or No" in text for text in llm.texts)
    assert any("No or Yes" in text for text in llm.texts)
    assert len(llm.texts) == 3 * 2  # one prompt an order


def test_score_is_the_mean_of_the_levels(ask):
    good = {"bad": 0.2, "fair": 0.3, "good": 0.5}
    client, llm = ask(lambda text: {label: good[name] for label, name in shown(text).items()})
    (answer,) = decide(client, [SCORE], calibrate=False)["answers"]
    assert answer["score"] == pytest.approx(0.3 + 2 * 0.5)
    assert [(p["label"], p["value"]) for p in answer["probabilities"]] == [("bad", 0), ("fair", 1), ("good", 2)]
    assert [p["probability"] for p in answer["probabilities"]] == pytest.approx([0.2, 0.3, 0.5])
    assert answer["confidence"] == pytest.approx(0.5)
    assert sorted(list(shown(text).values()) for text in llm.texts) == [
        ["bad", "fair", "good"],
        ["good", "fair", "bad"],
    ]


def test_all_rotations_take_out_a_preferred_place(ask):
    client, llm = ask(lambda text: colours(text, place_bias=7.0))
    (one,) = decide(client, [CHOICE], calibrate=False, orders=1)["answers"]
    (three,) = decide(client, [CHOICE], calibrate=False, orders=3)["answers"]
    assert one["probabilities"][0]["probability"] > 0.9
    assert probabilities(three) == pytest.approx(COLOURS)
    assert len(llm.texts) == 1 + 3


def test_the_prior_takes_out_what_a_model_always_says(ask):
    client, _ = ask(lambda text: colours(text, place_bias=3.0, own_bias={"blue": 20.0}))
    (raw,) = decide(client, [CHOICE], calibrate=False)["answers"]
    (calibrated,) = decide(client, [CHOICE])["answers"]
    assert raw["choice"] == "blue"
    assert probabilities(calibrated) == pytest.approx(COLOURS)


def test_a_prior_that_others_push_out_meanwhile_still_counts(ask):
    client, llm = ask(colours)
    first = decide(client, [CHOICE])
    (decider,) = client.app.state.deciders.values()

    def forgetting(text):
        decider._priors.clear()
        return colours(text)

    llm.opinion = forgetting
    assert decide(client, [CHOICE])["answers"] == first["answers"]
    assert len(llm.calls) == 8 + 2


def test_priors_are_learnt_once_a_question(ask):
    client, llm = ask(colours)
    first = decide(client, [CHOICE])
    assert len(llm.calls) == 2 + 2 * 3  # two orders, and three inputs that say nothing for each
    second = decide(client, [CHOICE], input="Something else: The sky.")
    assert len(llm.calls) == 8 + 2
    assert second["answers"] == first["answers"]
    decide(client, [CHOICE], cache_salt="mine")
    assert len(llm.calls) == 10 + 8  # whoever shares no cache shares no priors
    assert {call["salt"] for call in llm.calls[10:]} == {":mine"}


def test_temperature(ask):
    client, _ = ask(colours)
    (answer,) = decide(client, [CHOICE], temperature=2.0)["answers"]
    flat = {name: p**0.5 for name, p in COLOURS.items()}
    assert probabilities(answer) == pytest.approx({name: p / sum(flat.values()) for name, p in flat.items()})


def test_temperature_of_a_file(ask, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"tiny": 2.0}))
    client, _ = ask(colours, decision_temperatures=str(tmp_path / "t.json"))
    plain, _ = ask(colours)
    assert decide(client, [CHOICE])["answers"] == decide(plain, [CHOICE], temperature=2.0)["answers"]
    assert decide(client, [CHOICE], temperature=1.0)["answers"] == decide(plain, [CHOICE])["answers"]


@pytest.mark.parametrize("content", ["", "[1]", '{"tiny": 0}', '{"tiny": "2"}', '{"tiny": NaN}'])
def test_wrong_file_of_temperatures_is_told_at_the_start(ask, tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="decision_temperatures"):
        ask(colours, decision_temperatures=str(tmp_path / "t.json"))


@pytest.mark.parametrize("count", [26, 27, 255])
def test_many_choices(ask, count):
    def opinion(text):
        labels = shown(text)
        if re.fullmatch(r"[A-Z]", text[-1]) and text[-2] == ".":  # behind the first character of a code
            return {
                digit: 5.0 if (label := labels.get(text[-1] + digit)) == "o7" else bool(label) * 1.0 or 1e-20
                for digit in "0123456789"
            }
        home = next(label[0] for label, name in labels.items() if name == "o7")
        return {letter: 4.0 if letter == home else 1.0 for letter in {label[0] for label in labels}}

    client, llm = ask(opinion)
    question = CHOICE | {"choices": [{"value": f"o{i}"} for i in range(count)]}
    (answer,) = decide(client, [question], calibrate=False, orders=1)["answers"]
    assert answer["choice"] == "o7"
    assert [p["value"] for p in answer["probabilities"]] == [f"o{i}" for i in range(count)]
    assert sum(p["probability"] for p in answer["probabilities"]) == pytest.approx(1.0)
    groups = -(-count // 10)
    assert len(llm.calls) == (1 if count <= 26 else 1 + groups)
    expected = 4 / (count + 3) if count <= 26 else 4 / (groups + 3) * 5 / (10 + 4)
    assert answer["confidence"] == pytest.approx(expected)


def test_values_are_typed(ask):
    client, llm = ask(lambda text: {"A": 1.0, "B": 3.0})
    choices = [{"value": True, "description": "so it is"}, {"value": "true"}]
    (answer,) = decide(client, [CHOICE | {"choices": choices}], calibrate=False, orders=1)["answers"]
    assert answer["choice"] == "true"
    assert [p["value"] for p in answer["probabilities"]] == [True, "true"]
    assert "A: true - so it is\nB: true" in llm.texts[0]


def test_the_input_comes_before_the_question_and_its_first_prompt_runs_alone(ask):
    client, llm = ask(lambda text: {"Yes": 1.0, "No": 1.0})
    questions = [{"type": "predicate", "instructions": f"It has {i} words."} for i in range(5)]
    decide(client, questions, input="word " * 40, calibrate=False, orders=1)
    start = llm.texts[0][: llm.texts[0].index("Is this statement")]
    assert "word " * 40 in start
    assert all(text.startswith(start) for text in llm.texts)
    assert llm.texts[0].endswith("It has 0 words.\n\nAnswer with one word only: Yes or No.")


def test_items_of_an_input(ask):
    client, llm = ask(lambda text: {"Yes": 1.0, "No": 1.0})
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_json", "data": {"a": [1]}}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "42"}]},
        {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "y"},
    ]
    decide(client, [PREDICATE], input=items, calibrate=False, orders=1)
    said = llm.texts[0]
    parts = ["[developer]\nBe kind.", '[user]\nHi\n{"a":[1]}', "[assistant]\nNo.", "[call of f]\n{}", "[result]\n42"]
    assert "\n\n".join([*parts, "[call of g]\nx", "[result]\ny"]) in said


def test_usage_counts_every_prompt(ask):
    client, llm = ask(colours)
    usage = decide(client, [CHOICE])["usage"]
    assert usage["input_tokens"] == sum(len(call["prompt"]) for call in llm.calls)
    assert usage["output_tokens"] == len(llm.calls)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"] == {"cached_tokens": 3 * len(llm.calls), "cache_write_tokens": 0}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_ignored_fields_are_named(ask):
    client, _ = ask(colours)
    body = {"input": "x", "questions": [CHOICE], "prompt_cache_key": "k"}
    assert client.post("/v1/decisions", body).headers["x-tenfold-ignored"] == "prompt_cache_key"


WRONG = [
    ({"questions": []}, "questions", "at least 1"),
    ({"questions": [PREDICATE] * 401}, "questions", "--max-questions"),
    ({"questions": [{"type": "essay"}]}, "questions[0]", "predicate, choice or score"),
    ({"questions": [{"type": "predicate"}]}, "questions[0].instructions", "required"),
    ({"questions": [PREDICATE | {"wieght": 1}]}, "questions[0].wieght", "wieght"),
    ({"questions": [CHOICE | {"choices": [{"value": "a"}]}]}, "questions[0].choices", "at least 2"),
    ({"questions": [CHOICE | {"choices": [{"value": str(i)} for i in range(256)]}]}, "questions[0].choices", "255"),
    ({"questions": [CHOICE | {"choices": [{"value": 1}, {"value": 2}]}]}, "questions[0].choices[0].value", "boolean"),
    ({"questions": [CHOICE | {"choices": [{"value": "a"}] * 2}]}, "questions[0].choices", "unique"),
    ({"questions": [SCORE | {"levels": []}]}, "questions[0].levels", "at least 2"),
    ({"input": []}, "input", "at least 1"),
    ({"input": 3}, "input", "string"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0]", "user, developer, system, assistant"),
    ({"input": [{"type": "input_text", "text": "x"}]}, "input[0]", "function_call"),
    ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input[0].call_id", "no call"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        "input[0].content[0]",
        "image",
    ),
    (
        {"questions": [PREDICATE | {"instructions": [{"type": "input_image", "image_url": "data:,"}]}]},
        "questions[0].instructions[0]",
        "image",
    ),
    ({"input": "x" * 20000}, "input", "16383 tokens"),
    ({"orders": 0}, "orders", "greater than or equal to 1"),
    ({"temperature": 0}, "temperature", "0.05"),
    (
        {"questions": [CHOICE | {"choices": [{"value": str(i)} for i in range(255)]}] * 20, "orders": 26},
        None,
        "--max-decision-reads",
    ),
]


@pytest.mark.parametrize(("fields", "param", "word"), WRONG)
def test_wrong_fields(ask, fields, param, word):
    client, llm = ask(colours)
    response = client.post("/v1/decisions", {"input": "x", "questions": [PREDICATE]} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert word in error["message"]
    assert llm.calls == []


def test_a_vocabulary_without_letters_is_refused(ask, monkeypatch):
    client, llm = ask(colours)
    monkeypatch.setattr(llm, "token_bytes", lambda token: b"word")
    error = client.post("/v1/decisions", {"input": "x", "questions": [PREDICATE]}).json()["error"]
    assert (error["param"], error["code"]) == ("model", "invalid_value")


def test_letters_stand_in_where_yes_and_no_are_no_tokens(ask, monkeypatch):
    client, llm = ask(lambda text: {label: {"Yes": 3.0, "No": 1.0}[name] for label, name in shown(text).items()})
    monkeypatch.setattr(llm, "token_bytes", lambda token: bytes([token]) if token < 256 else b"-")
    (answer,) = decide(client, [PREDICATE], calibrate=False)["answers"]
    assert answer["probability"] == pytest.approx(0.75)


def test_an_error_of_the_engine(ask):
    client, llm = ask(colours)
    llm.fail = RuntimeError("secret")
    response = client.post("/v1/decisions", {"input": "x" * 200, "questions": [PREDICATE] * 3})
    assert response.status_code == 500
    assert "secret" not in response.text
