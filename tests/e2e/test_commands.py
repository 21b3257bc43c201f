"""Commands from option to output: the common way in processes of their own, mistakes and reports inside this one."""

import json
import socket

import pytest

from tenfold.ops.cpu import build, lib
from tests.vision import photograph

TORCH = ("--kernels", "torch")


@pytest.fixture(scope="module")
def model(tiny):
    return str(tiny("llama"))


def test_run_answers_a_pipe(tenfold, model):
    result = tenfold("run", "--model", model, *TORCH, "--max-tokens", "8", "-", input="the land\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n")
    ready, times = result.stderr.splitlines()
    assert ready.startswith("llama ready: start and imports ")
    assert " · weights " in ready
    assert times.startswith("first token ")
    assert "tokens/s" in times


def test_run_raw_and_quiet_prints_the_answer_only(tenfold, model):
    arguments = ("run", "--model", model, *TORCH, "--max-tokens", "8", "--raw", "-q", "the land")
    first, second = tenfold(*arguments), tenfold(*arguments)
    assert first.returncode == 0
    assert first.stderr == ""
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "-"], "The prompt is empty"),
        (["run", "hi", "--model", "no/such.gguf"], "no/such.gguf"),
        (["run", "hi", "--temperature", "-1"], "temperature is -1"),
        (["run", "hi", "--dtype", "int3"], "dtype is 'int3'"),
        (["run", "hi", "--device", "tpu"], "device is 'tpu'"),
        (["run", "hi", "--raw", "--system", "x"], "--system"),
    ],
)
def test_mistakes_get_one_line(inside, model, arguments, words):
    named = [] if "--model" in arguments else ["--model", model, *TORCH]
    result = inside(*arguments, *named, input="")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if " ready: " not in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert words in errors[0]
    assert result.stdout == ""


def test_a_broken_checkpoint_gets_one_line(inside, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 100)
    result = inside("run", "hi", "--model", str(broken))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert "broken.gguf" in result.stderr


def test_debug_shows_the_trace(tenfold):
    result = tenfold("--debug", "plan", "no/such.gguf")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_chat_reads_a_pipe(inside, model):
    lines = "the land\n/clear\n/wrong\n/system the hill\nand\n\n/exit\nnever read\n"
    result = inside("chat", model, *TORCH, "--max-tokens", "5", "--seed", "1", input=lines)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("first token ") == 2
    assert "/wrong is no command" in result.stderr
    assert result.stderr.count("starts anew") == 2


def test_chat_goes_on_after_a_mistake(inside, model):
    result = inside("chat", model, *TORCH, "--max-tokens", "5", "-q", input="the " * 300 + "\nand\n")
    assert result.returncode == 0
    assert result.stderr.startswith("error: prompt is ")
    assert result.stdout.endswith("\n")


def test_models_lists_what_resolves(inside, model, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / "mine").symlink_to(model)
    monkeypatch.setenv("TENFOLD_HOME", str(home))
    found = {m["name"]: m for m in json.loads(inside("models", "--json").stdout)}
    assert found["mine"]["kind"] == "safetensors"
    table = inside("models").stdout.splitlines()
    assert table[0].split() == ["NAME", "FAMILY", "WEIGHTS", "SIZE", "PATH"]
    assert any(line.startswith("mine ") for line in table)


def test_plan_fits(inside, model):
    result = inside("plan", model, *TORCH)
    assert result.returncode == 0, result.stderr
    for word in ("weights", "KV cache", "workspace", "total"):
        assert word in result.stdout


def test_plan_that_does_not_fit_says_what_would(inside, model):
    result = inside("plan", model, *TORCH, "--memory", "66M")
    assert result.returncode == 3
    assert "does not fit" in result.stdout
    assert "--max-step-tokens" in result.stdout


def test_quantize_writes_a_model_that_runs(inside, tiny, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "few-bits"
    text.write_text("the land and the hill lay under the wide sky, and nobody came. " * 80)
    asked = ("quantize", str(tiny("qwen2-moe-even")), "--text", str(text), "--out", str(out), "--bits", "5.5")
    wish = ("--schemes", "w2g32z,w4g32z,w8g32z", "--window", "64", "--windows", "8", "--device", "cpu")
    result = inside(*asked, *wish)
    assert result.returncode == 0, result.stderr
    assert "bits of a weight of experts" in result.stdout
    assert "of the layer's picks went to it" in result.stdout
    answer = inside("run", "--model", str(out), "--max-tokens", "5", "-q", "the land")
    assert answer.returncode == 0, answer.stderr
    again = inside(*asked, *wish)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_quantize_a_model_that_sees(inside, seeing, tmp_path):
    out, data = tmp_path / "few-bits", tmp_path / "pairs.jsonl"
    lines = []
    for i, said in enumerate(("A woman in uniform.", "the flag behind her", "an officer", "A face", "Nothing")):
        photograph().crop((60 * i, 40, 60 * i + 90, 140)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "What?", "answer": said}))
    data.write_text("\n".join(lines))
    model = str(seeing("llava"))
    asked = ("quantize", model, "--data", str(data), "--device", "cpu")
    result = inside(*asked, "--scheme", "w8g32z", "--tower", "w8a8", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "5 samples with 5 pictures" in result.stdout
    assert "a picture's token, attention" in result.stdout
    answer = inside("run", "--model", str(out), "--image", str(tmp_path / "1.png"), "--max-tokens", "3", "-q", "What?")
    assert answer.returncode == 0, answer.stderr
    table = inside(*asked, "--compare", "w3g32z,w4a8", "--samples", "3")
    assert table.returncode == 0, table.stderr
    assert "judged on 1 held out" in table.stdout
    assert table.stdout.count(" bits  loss ") == 1 + 2 * 4
    for wrong, message in (
        (("quantize", model, "--out", str(tmp_path / "x")), "nothing to calibrate on; give --data"),
        ((*asked, "--method", "gptq", "--out", str(tmp_path / "x")), "method is 'gptq'; allowed: auto, mxmoe, mbq"),
        ((*asked, "--scheme", "w3g32z", "--out", str(tmp_path / "x")), "cannot be stored as int3g32z"),
        (asked, "--out is missing"),
        (("quantize", model, "--method", "mxmoe", "--out", str(tmp_path / "x")), "--text is missing"),
    ):
        refused = inside(*wrong)
        assert refused.returncode == 2, wrong
        assert message in refused.stderr


def test_doctor(inside):
    result = inside("doctor", "--json")
    assert result.returncode == 0, result.stderr
    findings = {f["name"]: f for f in json.loads(result.stdout)}
    assert {"tenfold", "python", "torch", "processor", "C compiler", "CPU kernels", "GPU"} <= set(findings)
    assert all(f["state"] in ("on", "off", "info") and f["detail"] for f in findings.values())


def test_doctor_without_a_compiler_says_how_to_get_one(inside, monkeypatch):
    broken = lib.Status(None, "", "", (), 0, False, 0.0, "no C compiler was found.")
    monkeypatch.setattr(lib, "status", lambda: broken)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    result = inside("doctor", "--build")
    assert result.returncode == 0
    assert "- CPU kernels" in result.stdout
    assert "pip install ziglang" in result.stdout
    assert "not built: no C compiler was found." in result.stderr


def test_a_taken_port_is_told_before_the_model_loads(inside, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = inside("serve", model, "--port", port)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot listen on 127.0.0.1 port {port}")
    assert " ready: " not in result.stderr
