"""The GGUF container: files of the reference writer, every way a file can lie, and random damage."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.ops.blocks import BLOCKS, dequantize, quantize
from tenfold.ops.matrix import RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.gguf import GGUFFile, open_gguf
from tests.weights.gguf_files import gguf_bytes, string, write_gguf


def values(rows: int, cols: int, seed: int = 0) -> RawTensor:
    data = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return RawTensor("w", "F32", (rows, cols), data)


def named(raw: RawTensor, name: str) -> RawTensor:
    return RawTensor(name, raw.storage, raw.shape, raw.data)


METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.count": 7,
    "a.number": 0.5,
    "a.text": "grüße\n",
    "a.texts": ["x", "", "日本"],
    "a.numbers": np.arange(4, dtype=np.float32),
    "a.none": [],
}
TENSORS = [
    named(values(3, 64), "dense"),
    named(quantize(values(2, 64, 1), "Q4_1"), "blocks"),
    named(quantize(values(5, 32, 2), "Q8_0"), "more"),
    RawTensor("vector", "BF16", (6,), torch.arange(6).bfloat16()),
]


def test_a_file_of_the_reference_writer_reads_the_same(tmp_path):
    path = tmp_path / "reference.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 1 << 31)
    writer.add_int64("a.i64", -5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.no", False)
    writer.add_string("a.text", "é")
    writer.add_array("a.texts", ["one", "two"])
    writer.add_array("a.floats", [1.5, 2.5])
    writer.add_array("a.ints", [-1, 2])
    dense = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    packed = gguf.quantize(
        np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q5_1
    )
    writer.add_tensor("dense", dense)
    writer.add_tensor("half", dense[0].astype(np.float16))
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    wanted = {"a.u32": 1 << 31, "a.i64": -5, "a.f64": 0.1, "a.no": False, "a.text": "é", "a.texts": ["one", "two"]}
    assert {key: file.metadata[key] for key in wanted} == wanted
    assert file.metadata["a.floats"] == [1.5, 2.5]
    assert file.metadata["a.ints"] == [-1, 2]
    assert np.array_equal(file.raw("dense").data.numpy(), dense)
    assert np.array_equal(file.raw("half").data.numpy(), dense[0].astype(np.float16))
    raw = file.raw("packed")
    assert (raw.storage, raw.shape, tuple(raw.data.shape)) == ("Q5_1", (4, 64), packed.shape)
    assert np.array_equal(raw.data.numpy(), packed)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64])
def test_what_was_written_is_read_and_the_reference_reader_agrees(tmp_path, version, alignment):
    metadata = {**METADATA, "general.alignment": alignment}
    path = write_gguf(tmp_path / "m.gguf", metadata, TENSORS, version=version, alignment=alignment)
    file = GGUFFile(path)
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert file.metadata["a.text"] == "grüße\n"
    assert file.metadata["a.texts"] == ["x", "", "日本"]
    assert file.metadata["a.none"] == []
    for raw in TENSORS:
        assert torch.equal(file.raw(raw.name).data, raw.data)
        assert file.raw(raw.name).shape == raw.shape
        assert file.tensors[raw.name].offset == reference[raw.name].data_offset


def test_data_is_not_copied_and_outlives_the_file_object(tmp_path):
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", METADATA, TENSORS))
    first, second = file.raw("dense").data, file.raw("dense").data
    assert first.data_ptr() == second.data_ptr()
    del file
    assert torch.equal(first, TENSORS[0].data)


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", METADATA, TENSORS)
    before = path.read_bytes()
    GGUFFile(path).raw("dense").data.zero_()
    assert path.read_bytes() == before


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


HUGE = 1 << 62
LIES = {
    "empty": (b"", "empty"),
    "other file": (b"PK\x03\x04" + bytes(64), "does not start as one"),
    "short": (b"GGUF\x03", "does not start as one"),
    "version 1": (header(version=1), "version is 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (header(tensors=HUGE), "announces"),
    "entry count": (header(entries=HUGE), "announces"),
    "entries that are not there": (header(entries=3), "ends at byte"),
    "long key": (header(entries=1) + struct.pack("<Q", HUGE), "at most 1024"),
    "key past the end": (header(entries=1) + struct.pack("<Q", 900) + b"abc", "ends at byte"),
    "key not UTF-8": (header(entries=1) + string(b"\xff\xfe") + struct.pack("<I", 0), "not UTF-8"),
    "value type": (header(entries=1) + string("k") + struct.pack("<I", 99), "unknown type 99"),
    "bool": (header(entries=1) + string("k") + struct.pack("<IB", 7, 2), "neither 0 nor 1"),
    "string length": (header(entries=1) + string("k") + struct.pack("<IQ", 8, HUGE), "at most"),
    "string past the end": (header(entries=1) + string("k") + struct.pack("<IQ", 8, 1 << 20), "ends at byte"),
    "string array count": (header(entries=1) + string("k") + struct.pack("<IIQ", 9, 8, HUGE), "array of"),
    "string array past the end": (header(entries=1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 20), "ends at"),
    "string in array past the end": (
        header(entries=1) + string("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE) + b"abc",
        "ends at byte",
    ),
    "number array count": (header(entries=1) + string("k") + struct.pack("<IIQ", 9, 12, HUGE), "array of"),
    "number array past the end": (header(entries=1) + string("k") + struct.pack("<IIQ", 9, 12, 9), "ends at byte"),
    "bool array past the end": (header(entries=1) + string("k") + struct.pack("<IIQ", 9, 7, 1 << 20), "ends at byte"),
    "nesting": (header(entries=1) + string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, "deeper"),
    "same key twice": (
        header(entries=2) + (string("k") + struct.pack("<IB", 0, 1)) * 2,
        "'k' stands in it twice",
    ),
    "alignment 0": (header(entries=1) + string("general.alignment") + struct.pack("<II", 4, 0), "alignment"),
    "alignment 12": (header(entries=1) + string("general.alignment") + struct.pack("<II", 4, 12), "alignment"),
    "alignment text": (header(entries=1) + string("general.alignment") + struct.pack("<I", 8) + string("x"), "align"),
    "no dimensions": (header(tensors=1) + entry("t", ()) + bytes(64), "0 dimensions"),
    "many dimensions": (header(tensors=1) + entry("t", (1,) * 9) + bytes(64), "9 dimensions"),
    "zero size": (header(tensors=1) + entry("t", (4, 0)) + bytes(64), "has the shape"),
    "huge size": (header(tensors=1) + entry("t", (HUGE, HUGE)) + bytes(64), "has the shape"),
    "unknown storage": (header(tensors=1) + entry("t", (32,), 77) + bytes(64), "type 77"),
    "storage without decoder": (header(tensors=1) + entry("t", (256,), 23) + bytes(999), "IQ4_XS.*Q4_K"),
    "partial block": (header(tensors=1) + entry("t", (33,), 8) + bytes(99), "33 values, which Q8_0"),
    "misaligned": (header(tensors=1) + entry("t", (4,), offset=4) + bytes(99), "not aligned"),
    "offset past the end": (header(tensors=1) + entry("t", (4,), offset=HUGE) + bytes(99), "ends at byte"),
    "data past the end": (header(tensors=1) + entry("t", (64,)) + bytes(99), "cut short"),
    "same tensor twice": (header(tensors=2) + entry("t", (4,)) + entry("t", (4,), 0, 32) + bytes(99), "twice"),
    "overlap": (header(tensors=2) + entry("t", (16,)) + entry("u", (4,), 0, 32) + bytes(999), "overlap"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_gets_a_sentence(tmp_path, case):
    content, message = LIES[case]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s)lie\.gguf.*{message}.*\."):
        open_gguf(path)


def test_no_file_and_a_folder_get_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path)


@pytest.mark.parametrize("tail", [1, 40, 100, 400, 700])
def test_a_truncated_file_gets_a_sentence(tmp_path, tail):
    # The last tensor is 12 bytes and 20 of padding, which may be missing.
    path = write_gguf(tmp_path / "m.gguf", METADATA, TENSORS, tail=20 + tail)
    with pytest.raises(CheckpointError):
        GGUFFile(path)


def parts(folder: Path, count: int, numbers: list[int] | None = None) -> list[Path]:
    paths = []
    for number in range(count):
        given = {
            "general.architecture": "llama",
            "split.no": (numbers or list(range(count)))[number],
            "split.count": count,
        }
        tensors = [TENSORS[number]]
        paths.append(write_gguf(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf", given, tensors))
    return paths


def test_a_split_model_opens_from_any_part(tmp_path):
    for path in parts(tmp_path, 3):
        files = open_gguf(path)
        assert [list(file.tensors) for file in files] == [["dense"], ["blocks"], ["more"]]


def test_split_models_that_do_not_fit_together_get_a_sentence(tmp_path):
    (tmp_path / "a").mkdir()
    paths = parts(tmp_path / "a", 3)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf are missing"):
        open_gguf(paths[0])
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="Its name was changed"):
        open_gguf(parts(tmp_path / "b", 3, [0, 2, 1])[0])
    renamed = parts(tmp_path / "b", 2)[0].rename(tmp_path / "plain.gguf")
    with pytest.raises(CheckpointError, match="not named like one"):
        open_gguf(renamed)
    (tmp_path / "c").mkdir()
    paths = parts(tmp_path / "c", 2)
    paths[1].write_bytes(gguf_bytes({"split.no": 1, "split.count": 2}, [TENSORS[0]]))
    with pytest.raises(CheckpointError, match="both hold the tensor 'dense'"):
        open_gguf(paths[0])


SEED = gguf_bytes(METADATA, TENSORS)


def read_all(path: Path) -> None:
    """Open a file and use everything in it; a sentence is as good as a success."""
    try:
        files = open_gguf(path)
    except CheckpointError as error:
        files, problem = [], str(error)
    assert files or str(path) in problem
    for file in files:
        for name, tensor in file.tensors.items():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= file.file.size
            with np.errstate(all="ignore"):
                dequantize(file.raw(name))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_never_escapes(tmp_path, data):
    content = bytearray(SEED)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "long"])):
            case "flip":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=24))
            case "long":
                content[at : at + 8] = struct.pack(
                    "<Q", data.draw(st.sampled_from([0, 2**31, 2**32, 2**63, 2**64 - 1]))
                )
        content = content or bytearray(b"G")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    read_all(path)


def test_every_length_of_a_file_is_a_sentence_or_a_success(tmp_path):
    path = tmp_path / "cut.gguf"
    for size in range(1, len(SEED), 7):
        path.write_bytes(SEED[:size])
        read_all(path)


@pytest.mark.parametrize("storage", sorted(BLOCKS))
def test_every_block_type_passes_through_a_file(tmp_path, storage):
    block = BLOCKS[storage]
    data = torch.arange(3 * 2 * block.nbytes).remainder(97).to(torch.uint8).view(3, -1)
    raw = RawTensor("w", storage, (3, 2 * block.elements), data)
    read = GGUFFile(write_gguf(tmp_path / "m.gguf", {}, [raw])).raw("w")
    assert (read.storage, read.shape) == (storage, raw.shape)
    assert torch.equal(read.data, data)
