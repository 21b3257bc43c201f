from tenfold.engine.request import FinishReason, SamplingParams


def test_answer(client, llm):
    response = client.chat()
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].startswith("fp_")
    assert isinstance(body["created"], int)
    message = {"role": "assistant", "content": llm.answer, "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt, length = len("<user>Hi"), len(llm.answer.encode())
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": length,
        "total_tokens": prompt + length,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert response.headers["x-request-id"] == body["id"].replace("chatcmpl-", "req-")
    assert llm.finished == [body["id"]]


def test_every_sampling_field_reaches_the_engine(client, llm):
    fields = {
        "max_completion_tokens": 9,
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["\n", "END"],
        "seed": 7,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "logit_bias": {"65": -100, "66": 2.5},
        "logprobs": True,
        "top_logprobs": 3,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "priority": -5,
        "user": "ann",
        "cache_salt": "s",
        "ttft": 0.5,
        "tpot": 0.02,
    }
    assert client.chat(**fields).status_code == 200
    call = llm.calls[0]
    assert call["params"] == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={65: -100, 66: 2.5},
        seed=7,
        n=2,
        logprobs=3,
        stop=("\n", "END"),
        stop_token_ids=(3, 4),
        include_stop=True,
        ignore_eos=True,
        skip_special_tokens=False,
    )
    assert (call["priority"], call["user"], call["salt"], call["deadline"]) == (-5, "ann", ":s", None)
    assert (call["ttft"], call["tpot"]) == (0.5, 0.02)


def test_absent_and_null_fields_are_the_models_defaults(client, llm):
    client.chat(temperature=None, stop=None, n=None, logit_bias=None, stream=None, max_tokens=None)
    assert llm.calls[0]["params"] == SamplingParams(top_k=50)


def test_stop_strings_of_the_models_template_are_kept(client, llm, monkeypatch):
    monkeypatch.setattr(llm, "default_params", lambda chat: SamplingParams(stop=("User:", "x")))
    client.chat(stop=["x", "y"])
    assert llm.calls[0]["params"].stop == ("x", "y", "User:")


def test_messages_become_plain_text_for_the_template(client, llm):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": None, "refusal": "No.", "audio": None, "annotations": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}], "reasoning_content": "Hm."},
    ]
    response = client.chat(
        messages=messages,
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
        add_generation_prompt=False,
    )
    assert response.status_code == 200
    rendered, kwargs = llm.rendered[0]
    assert rendered == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb", "name": "ann"},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "Never.", "reasoning_content": "Hm."},
    ]
    assert kwargs == {"enable_thinking": False, "reasoning_effort": "low", "add_generation_prompt": False}


def test_logprobs(client):
    choice = client.chat(logprobs=True, top_logprobs=2, max_tokens=2).json()["choices"][0]
    top = [{"token": "a", "logprob": -1.0, "bytes": [97]}, {"token": "b", "logprob": -2.0, "bytes": [98]}]
    assert choice["logprobs"] == {
        "content": [
            {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": top},
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},  # half of the ä
        ],
        "refusal": None,
    }


def test_logprobs_without_rivals(client):
    content = client.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": []}]


def test_several_answers(client, llm):
    choices = client.chat(n=3).json()["choices"]
    assert [(c["index"], c["message"]["content"]) for c in choices] == [(i, f"{llm.answer}{i}") for i in range(3)]


def test_length_is_told(client, llm):
    llm.finish = FinishReason.LENGTH
    assert client.chat(max_tokens=3).json()["choices"][0]["finish_reason"] == "length"


def test_cached_tokens_are_counted_once_a_prompt(client):
    usage = client.chat(messages=[{"role": "user", "content": "x" * 40}], n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}


def test_ignored_fields_are_named(client):
    response = client.chat(store=True, service_tier="auto", temperature=0)
    assert response.status_code == 200
    assert response.headers["x-tenfold-ignored"] == "service_tier, store"


def test_neutral_values_of_refused_fields_pass(client):
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert client.chat(**neutral, audio=None, functions=None).status_code == 200


def test_stream(client, llm, read_events):
    events = read_events(client.chat(stream=True))
    assert len({(e["id"], e["created"], e["model"], e["system_fingerprint"]) for e in events}) == 1
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert all("usage" not in e for e in events)
    choices = [e["choices"][0] for e in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": "H"}
    assert all("role" not in c["delta"] for c in choices[1:])
    assert "".join(c["delta"].get("content", "") for c in choices) == llm.answer
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len(choices) == len(llm.answer)  # the two tokens of the ä make one event


def test_stream_of_several_answers(client, llm, read_events):
    texts, roles, ends = {}, [], []
    for e in read_events(client.chat(stream=True, n=2)):
        (choice,) = e["choices"]
        i = choice["index"]
        texts[i] = texts.get(i, "") + choice["delta"].get("content", "")
        roles += [i] if "role" in choice["delta"] else []
        ends += [i] if choice["finish_reason"] else []
    assert texts == {0: llm.answer + "0", 1: llm.answer + "1"}
    assert sorted(roles) == sorted(ends) == [0, 1]


def test_stream_with_usage(client, llm, read_events):
    *events, last = read_events(client.chat(stream=True, stream_options={"include_usage": True}))
    assert all(e["usage"] is None for e in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(llm.answer.encode())


def test_stream_with_running_usage(client, read_events):
    events = read_events(client.chat(stream=True, stream_options={"continuous_usage_stats": True}))
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts)
    assert counts[0] == 1


def test_stream_with_logprobs(client, llm, read_events):
    events = read_events(client.chat(stream=True, logprobs=True))
    entries = [entry for e in events for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == llm.answer


def test_streams_are_ascii(client):
    assert client.chat(stream=True).content.isascii()
