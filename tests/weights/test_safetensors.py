"""The safetensors container: files of the reference library, every way a header can lie, and random damage."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.safetensors import SafetensorsFile

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(6).bfloat16(),
    "c": torch.arange(8).half().view(2, 2, 2),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}


def test_a_file_of_the_reference_library_reads_the_same(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert set(file.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        raw = file.raw(name)
        assert torch.equal(raw.data, tensor)
        assert raw.data.dtype == tensor.dtype
        assert raw.shape == tuple(tensor.shape)
    assert file.raw("a").data.data_ptr() == file.raw("a").data.data_ptr()


def test_types_that_are_no_weights_get_a_sentence_when_asked_for(tmp_path):
    save_file({"w": torch.zeros(4, dtype=torch.int64), "x": torch.ones(2)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert torch.equal(file.raw("x").data, torch.ones(2))
    with pytest.raises(CheckpointError, match=r"w is stored as I64; readable are F32, F16, BF16"):
        file.raw("w")


def content(header: Any, data: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def test_data_that_starts_at_an_odd_byte_is_copied(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    odd = header + b" " * (1 + (-len(header)) % 4)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(odd)) + odd + struct.pack("<2f", 1.5, -2.0))
    assert SafetensorsFile(path).raw("a").data.tolist() == [1.5, -2.0]


def one(**values: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **values}}


LIES = {
    "short": (b"abc", "3 bytes, too few"),
    "header length": (struct.pack("<Q", 1 << 62) + bytes(64), "announces a header"),
    "header past the end": (struct.pack("<Q", 65) + bytes(64), "announces a header"),
    "no JSON": (content(b"{nonsense"), "not valid JSON"),
    "deep JSON": (content(b"[" * 100000), "not valid JSON"),
    "not UTF-8": (content(b'{"\xff": 1}'), "not valid JSON"),
    "list": (content([1]), "JSON list where an object"),
    "entry": (content({"t": 3}), "not described by an object"),
    "type": (content(one(dtype="F33")), "unknown type 'F33'"),
    "type number": (content(one(dtype=3)), "unknown type '3'"),
    "no shape": (content(one(shape=None)), "has the shape None"),
    "negative shape": (content(one(shape=[-4])), "has the shape"),
    "bool shape": (content(one(shape=[True, 4])), "has the shape"),
    "huge shape": (content(one(shape=[1 << 62, 1 << 62])), "has 16 bytes"),
    "many dimensions": (content(one(shape=[1] * 99)), "has the shape"),
    "offset text": (content(one(data_offsets=["0", "16"])), "has the offsets"),
    "one offset": (content(one(data_offsets=[0])), "has the offsets"),
    "offsets reversed": (content(one(data_offsets=[16, 0])), "ends at byte"),
    "offset past the end": (content(one(shape=[40], data_offsets=[0, 160])), "ends at byte"),
    "size": (content(one(shape=[5])), "has 16 bytes"),
    "overlap": (content({**one(), "u": one(data_offsets=[8, 24])["t"]}), "overlap"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_gets_a_sentence(tmp_path, case):
    data, message = LIES[case]
    path = tmp_path / "lie.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"(?s)lie\.safetensors.*{message}.*\."):
        SafetensorsFile(path)


SEED = save({name: tensor for name, tensor in TENSORS.items() if name != "none"})


def read_all(path: Path) -> None:
    """Open a file and use everything in it; a sentence is as good as a success."""
    problem = str(path)
    try:
        file = SafetensorsFile(path)
        for name, entry in file.tensors.items():
            assert 0 <= entry.offset <= entry.offset + entry.nbytes <= file.file.size
            file.raw(name).data.float().sum()
    except CheckpointError as error:
        problem = str(error)
    assert str(path) in problem


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_never_escapes(tmp_path, data):
    damaged = bytearray(SEED)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["digit", "flip", "cut", "insert"])):
            case "digit":
                digits = [i for i, byte in enumerate(damaged) if 48 <= byte <= 57]
                damaged[digits[at % len(digits)] if digits else at] = 48 + data.draw(st.integers(0, 9))
            case "flip":
                damaged[at] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 40))]
            case "insert":
                damaged[at:at] = data.draw(st.sampled_from([b"9", b"-", b"[", b'"', b"e99", b"\xff", b"\0" * 8]))
        damaged = damaged or bytearray(b"{")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    read_all(path)


def test_every_length_of_a_file_is_a_sentence_or_a_success(tmp_path):
    path = tmp_path / "cut.safetensors"
    for size in range(1, len(SEED)):
        path.write_bytes(SEED[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
