"""Quantised checkpoints of other tools: every value is found again exactly, and what is not understood is refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenfold.models.table import build_model, model_config
from tenfold.ops.blocks import dequantize
from tenfold.ops.formats import format_of
from tenfold.ops.kernels import Kernels
from tenfold.ops.oracle import Oracle
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.foreign import own
from tenfold.weights.foreign.linear import Files, fields, stream
from tenfold.weights.foreign.table import foreign_linears
from tenfold.weights.hf import HFCheckpoint
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tenfold.weights.safetensors import TensorEntry
from tests.steps import Sequences, make_store
from tests.weights import foreign_files as files
from tests.weights.foreign_files import awq, compressed, fp8, gptq, packed, plain_int, quantise

Folder = Callable[[str], Path]
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
PACKED, PLAIN = "pack-quantized", "int-quantized"
TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def ints(bits: int, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False, **more}


STORAGES = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}

# name: (quantization_config, writer, storage of the linears of the blocks)
LAYOUTS: dict[str, tuple[dict[str, Any], files.Writer, str]] = {
    "gptq": (GPTQ, gptq(), "int4g32"),
    "gptq-asymmetric": ({**GPTQ, "sym": False}, gptq(symmetric=False), "int4g32z"),
    "gptq-v2": (
        {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        gptq(symmetric=False, version=2),
        "int4g32z",
    ),
    "gptq-2": ({**GPTQ, "bits": 2}, gptq(bits=2), "int2g32"),
    "gptq-3-act-order": (
        {**GPTQ, "desc_act": True, "bits": 3, "sym": False},
        gptq(bits=3, symmetric=False, shuffle=True),
        "int3g32zo",
    ),
    "gptq-8": ({**GPTQ, "bits": 8}, gptq(bits=8), "int8g32"),
    "gptq-8-asymmetric": ({**GPTQ, "bits": 8, "sym": False}, gptq(bits=8, symmetric=False), "int8g32z"),
    "gptq-channel": ({**GPTQ, "group_size": -1}, gptq(group=-1, index=False), "int4"),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, gptq(shuffle=True), "int4g32o"),
    "gptq-act-order-8": (
        {**GPTQ, "desc_act": True, "bits": 8, "sym": False},
        gptq(bits=8, symmetric=False, shuffle=True),
        "int8g32zo",
    ),
    "awq": (AWQ, awq(), "int4g32z"),
    "packed-4": (compressed("pack-quantized", ints(4, "group", group_size=32)), packed(), "int4g32"),
    "packed-4-asymmetric": (
        compressed("pack-quantized", ints(4, "group", False, group_size=32)),
        packed(symmetric=False),
        "int4g32z",
    ),
    "packed-4-float8": (
        compressed("pack-quantized", ints(4, "group", group_size=32), {"num_bits": 8, "type": "float"}),
        packed(),
        "int4g32a8",
    ),
    "packed-4-asymmetric-float8": (
        compressed("pack-quantized", ints(4, "group", False, group_size=32), {"num_bits": 8, "type": "float"}),
        packed(symmetric=False),
        "int4g32z",
    ),
    "packed-2": (compressed("pack-quantized", ints(2, "group", group_size=32)), packed(bits=2), "int2g32"),
    "packed-3-asymmetric": (
        compressed("pack-quantized", ints(3, "group", False, group_size=32)),
        packed(bits=3, symmetric=False),
        "int3g32z",
    ),
    "packed-8-channel": (compressed("pack-quantized", ints(8, "channel")), packed(bits=8, group=-1), "int8"),
    "packed-8-unnamed": (
        compressed("pack-quantized", {"num_bits": 8, "type": "int", "group_size": -1}),
        packed(bits=8, group=-1),
        "int8",
    ),
    "packed-8-asymmetric": (
        compressed("pack-quantized", ints(8, "channel", False)),
        packed(bits=8, group=-1, symmetric=False),
        "int8z",
    ),
    "int-8": (
        compressed("int-quantized", ints(8, "channel"), ints(8, "token", dynamic=True)),
        plain_int(),
        "int8",
    ),
    "int-8-asymmetric": (compressed("naive-quantized", ints(8, "channel", False)), plain_int(symmetric=False), "int8z"),
    "int-3": (compressed("naive-quantized", ints(3, "channel")), plain_int(3), "int3"),
    "int-4-asymmetric": (
        compressed("naive-quantized", ints(4, "group", False, group_size=32)),
        plain_int(4, 32, symmetric=False),
        "int4g32z",
    ),
    "float-tensor": (
        compressed("naive-quantized", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, "strategy": "tensor"}),
        fp8("tensor"),
        "fp8a8",
    ),
    "float-channel": (
        compressed("float-quantized", {**FLOAT8, "strategy": "channel"}, TOKEN),
        fp8("channel", dtype=torch.bfloat16),
        "fp8a8",
    ),
    "float-weights-only": (compressed("float-quantized", {**FLOAT8, "strategy": "channel"}), fp8("channel"), "fp8"),
    "float-block": (
        compressed("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [32, 32]}, TOKEN),
        fp8("block"),
        "fp8g32a8",
    ),
    "fp8-block": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"},
        fp8("block", "weight_scale_inv"),
        "fp8g32a8",
    ),
    "fp8-block-e8m0": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        fp8("block", "weight_scale_inv", torch.float8_e8m0fnu),
        "fp8g32a8",
    ),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8("tensor"), "fp8a8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8("channel"), "fp8a8"),
}


def assert_values(folder: Path, values: dict[str, torch.Tensor], storage: str) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(values)
    for name, wanted in values.items():
        raw = checkpoint.tensor(name)
        assert name in checkpoint
        fits = name.removesuffix(".weight").endswith(files.LINEARS) and not format_of(storage).obstacle(wanted.shape[1])
        assert raw.storage == (storage if fits else "F32")
        assert raw.shape == tuple(wanted.shape)
        assert torch.equal(dequantize(raw), wanted.float()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_value_is_found_again(layout: str, tiny: Folder, tmp_path: Path) -> None:
    settings, write, storage = LAYOUTS[layout]
    values = quantise(tiny("llama"), tmp_path, settings, write)
    assert_values(tmp_path, values, storage)


@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "qwen2-moe-even"])
@pytest.mark.parametrize(
    "layout", ["gptq", "gptq-act-order", "awq", "packed-4-asymmetric", "float-channel", "fp8-block"]
)
def test_logits_are_those_of_the_dequantised_model(
    layout: str, family: str, tiny: Folder, tmp_path: Path, kernels: Kernels
) -> None:
    """Stacked projections, biases, experts and all. The same numbers in the same order: equal in torch, up to how
    products of other places in memory are added up.

    The compiled kernels round activations to 8 bits where weights run as blocks, and to nothing where they are float32;
    against the same checkpoint dequantised by hand that leaves 4 % of the logits' spread; a wrong zero leaves 100 %.
    """
    settings, write, _ = LAYOUTS[layout]
    values = quantise(tiny(family), tmp_path / "packed", settings, write)
    shutil.copytree(tiny(family), tmp_path / "dense")
    save_file(values, tmp_path / "dense" / "model.safetensors")

    logits = []
    for name in ("packed", "dense"):
        checkpoint = open_checkpoint(tmp_path / name)
        model = build_model(checkpoint.config, Weights(checkpoint, kernels), 64)
        sequences = Sequences(make_store(model.config, page_size=4))
        with torch.inference_mode():
            logits.append(model.forward(sequences.step({0: [3, 9, 200, 7], 1: list(range(5, 30))}, "all")))
    bound = 1e-6 if kernels.name == "torch" else 0.1
    assert (logits[0] - logits[1]).square().mean() <= bound**2 * logits[1].square().mean()


def test_projections_with_one_scale_each_stack_by_rows(tiny: Folder, tmp_path: Path) -> None:
    settings, write, _ = LAYOUTS["float-tensor"]
    values = quantise(tiny("llama"), tmp_path, settings, write)
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    matrix = Weights(open_checkpoint(tmp_path), Oracle()).matrix(*names)
    assert torch.equal(matrix.data[0], torch.cat([values[name] for name in names]))


def test_modules_may_differ_and_stay_dense(tiny: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name before pattern before class; what has a plain weight is dense, whatever the lists say."""
    weights = {
        "group_0": {"targets": ["Linear"], "weights": ints(4, "group", group_size=32), "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*down_proj"], "weights": ints(8, "channel"), "format": "int-quantized"},
        "group_2": {
            "targets": ["model.layers.1.mlp.down_proj"],
            "weights": {**FLOAT8, "strategy": "tensor"},
            "format": "float-quantized",
        },
    }
    settings = {**compressed("mixed-precision", {}), "config_groups": weights, "ignore": ["re:.*o_proj$", "lm_head"]}
    with caplog.at_level(logging.INFO, "tenfold"):
        values = quantise(
            *(tiny("llama"), tmp_path, settings, packed()),
            **{"layers.1.mlp.down_proj": fp8("tensor"), "down_proj": plain_int(), "o_proj": None},
        )
        checkpoint = open_checkpoint(tmp_path)
    (line,) = caplog.messages
    method, *counts = line.removeprefix("weights: ").split(", ")
    assert (method, sorted(counts)) == ("compressed-tensors", ["1 as fp8", "15 as int4g32", "2 as int8"])
    for name, wanted in values.items():
        assert torch.equal(dequantize(checkpoint.tensor(name)), wanted.float()), name
    assert checkpoint.tensor("model.layers.0.self_attn.o_proj.weight").storage == "F32"
    assert checkpoint.tensor("model.layers.1.mlp.down_proj.weight").storage == "fp8"


def test_gptq_may_set_modules_apart(tiny: Folder, tmp_path: Path) -> None:
    dynamic = {"-:.*o_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": -1}}
    values = quantise(
        *(tiny("llama"), tmp_path, {**GPTQ, "dynamic": dynamic}, gptq()), o_proj=None, down_proj=gptq(8, -1)
    )
    checkpoint = open_checkpoint(tmp_path)
    storages = [checkpoint.tensor(f"model.layers.0.{p}_proj.weight").storage for p in ("self_attn.o", "mlp.down")]
    assert storages == ["F32", "int8"]
    assert all(torch.equal(dequantize(checkpoint.tensor(name)), values[name].float()) for name in values)


def ends(folder: Path, part: str) -> dict[str, str]:
    """Matrices of a model that sees, by our names, and their modules as the file calls them; of a part of the model."""
    source = open_checkpoint(folder)
    assert isinstance(source, HFCheckpoint)
    ours = [n for n in source.names() if n.startswith(part) and n.removesuffix(".weight").endswith(files.LINEARS)]
    return {name: source.stored_name(name).removesuffix(".weight") for name in ours}


@pytest.mark.parametrize("targets", [["re:vision_tower.*q_proj"], None])
def test_groups_name_modules_as_the_file_does(targets: list[str] | None, seeing: Folder, tmp_path: Path) -> None:
    """By pattern or by name, in a model whose file has other names than ours; `ignore` too."""
    folder = seeing("llava")
    tower = {ours: stored for ours, stored in ends(folder, "vision.").items() if stored.endswith("q_proj")}
    groups = {
        "group_0": {"targets": targets or list(tower.values()), "weights": ints(8, "channel"), "format": PLAIN},
        "group_1": {"targets": ["re:language_model.*"], "weights": ints(4, "group", group_size=32), "format": PACKED},
    }
    settings = {**compressed("mixed-precision", {}), "config_groups": groups, "ignore": ["re:vision_tower.*v_proj"]}
    left = dict.fromkeys(ends(folder, "vision.").values())
    values = quantise(folder, tmp_path, settings, packed(), **(left | dict.fromkeys(tower.values(), plain_int())))
    checkpoint = open_checkpoint(tmp_path)
    for name in tower:
        assert checkpoint.tensor(name).storage == "int8"
    for name, stored in (ends(folder, "vision.") | ends(folder, "model.")).items():
        assert torch.equal(dequantize(checkpoint.tensor(name)), values[f"{stored}.weight"].float()), name
    edit_config(tmp_path, ignore=["re:language_model.*v_proj"])
    with pytest.raises(CheckpointError, match=r"language_model\.model\..*v_proj is quantised and in the list"):
        open_checkpoint(tmp_path)
    edit_config(tmp_path, ignore=[], config_groups={**groups, "group_1": {**groups["group_1"], "targets": ["other"]}})
    with pytest.raises(CheckpointError, match=r"language_model\.model\..* is quantised and no group of config_groups"):
        open_checkpoint(tmp_path)


def test_gptq_sets_modules_apart_by_their_names_in_the_file(seeing: Folder, tmp_path: Path) -> None:
    folder = seeing("llava")
    dynamic = {r"-:vision_tower\.": {}, r"+:language_model\.model\..*\.down_proj": {"bits": 8, "group_size": -1}}
    left = dict.fromkeys(ends(folder, "vision.").values())
    values = quantise(folder, tmp_path, {**GPTQ, "dynamic": dynamic}, gptq(), **left, down_proj=gptq(8, -1))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensor("model.layers.0.mlp.down_proj.weight").storage == "int8"
    for name, stored in ends(folder, "model.").items():
        assert torch.equal(dequantize(checkpoint.tensor(name)), values[f"{stored}.weight"].float()), name


def test_columns_that_fit_no_format_are_made_dense(tiny: Folder, tmp_path: Path) -> None:
    """48 columns are no whole number of 16-byte pieces of int4."""
    settings, write = compressed("pack-quantized", ints(4, "channel")), packed(group=-1)
    values = quantise(tiny("llama-tied"), tmp_path, settings, write, down_proj=None)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert checkpoint.tensor(name).storage == "F32"
    assert torch.equal(dequantize(checkpoint.tensor(name)), values[name])


@pytest.mark.parametrize("layout", ["gptq-2", "gptq-3-act-order", "packed-2", "packed-3-asymmetric", "int-3"])
def test_few_bits_stay_packed_where_columns_fit(layout: str, tmp_path: Path) -> None:
    settings, write, storage = LAYOUTS[layout]
    state: dict[str, torch.Tensor] = {}
    wanted = write(state, "m", torch.randn(40, 256, generator=torch.Generator().manual_seed(1)))
    entries = {name: TensorEntry(STORAGES[t.dtype], tuple(t.shape), 0, 0) for name, t in state.items()}
    (found,) = foreign_linears(settings, Files(tmp_path, entries, state.__getitem__, str)).values()
    assert (found.storage, found.rows, found.cols) == (storage, 40, 256)
    raw = found.raw().on("cpu")
    assert raw.data.numel() * raw.data.element_size() * 8 == 40 * 256 * format_of(storage).bits
    assert torch.equal(dequantize(raw), wanted)


@pytest.mark.parametrize("wrong", [None, 0, -1, 256])
def test_an_order_of_columns_names_each_once(wrong: int | None, tmp_path: Path) -> None:
    """In our own layout; wrong: a column that is named twice, or none of them, in another's place."""
    format = format_of("int4g32o")
    w = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    order = torch.arange(256, dtype=torch.int32).flip(0)
    plain = format_of("int4g32").pack(w[:, order.long()])
    state = own.tensors("m", plain._replace(order=order))
    if wrong is not None:
        state["m.order"][3] = wrong
    entries = {name: TensorEntry(STORAGES[t.dtype], tuple(t.shape), 0, 0) for name, t in state.items()}
    read = Files(tmp_path, entries, state.__getitem__, str)
    if wrong is not None:
        with pytest.raises(CheckpointError, match=r"m\.order does not name each of 256 columns once\. Download it"):
            foreign_linears(own.settings_of({"m": format}), read)
        return
    (found,) = foreign_linears(own.settings_of({"m": format}), read).values()
    assert torch.equal(dequantize(found.raw().on("cpu"))[:, order.long()], format_of("int4g32").unpack(plain))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_and_streams_are_inverse(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 96), generator=torch.Generator().manual_seed(bits)).byte()
    words = stream(codes, bits)
    assert words.shape == (5, 96 * bits // 32)
    assert torch.equal(words, files.words(codes.long().numpy(), bits))
    assert torch.equal(fields(words, bits), codes)


def test_settings_in_a_file_of_their_own(tiny: Folder, tmp_path: Path) -> None:
    values = quantise(tiny("llama"), tmp_path, {}, awq())
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})
    )
    assert_values(tmp_path, values, "int4g32z")


def test_scales_of_activations_and_biases_of_zeros_are_no_leftovers(
    tiny: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantise(tiny("llama"), tmp_path, GPTQ, gptq())
    state = load_file(tmp_path / "model.safetensors")
    for module in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        state[f"{module}.bias"] = torch.zeros(8, dtype=torch.float16)
        state[f"{module}.input_scale"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING, "tenfold"):
        build_model(checkpoint.config, Weights(checkpoint, Oracle()), 64)
    assert not caplog.messages


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq", lambda s: s.pop(f"{Q}.scales"), "q_proj.scales is missing"),
        ("gptq", lambda s: s.pop(f"{Q}.qzeros"), "q_proj.qzeros is missing"),
        ("gptq", lambda s: s.update({f"{Q}.scales": torch.ones(3, 64)}), r"has shape \[3, 64\]; expected \[2, 64\]"),
        ("gptq", lambda s: s.update({f"{Q}.qweight": torch.ones(8, 64)}), "stored as F32; expected I32"),
        (
            "gptq",
            lambda s: s.update({f"{Q}.g_idx": torch.zeros(64, dtype=torch.int32)}),
            "g_idx does not give 32 columns to every group",
        ),
        ("awq", lambda s: s.pop(f"{Q}.qzeros"), "q_proj.qzeros is missing"),
        ("packed-4", lambda s: s.pop(f"{Q}.weight_scale"), "q_proj.weight_scale is missing"),
        ("packed-4", lambda s: s.pop(f"{Q}.weight_shape"), "q_proj.weight_shape is missing"),
        ("packed-4", lambda s: s.update({f"{Q}.weight_shape": torch.tensor([64, 96])}), "8 words a row"),
        ("packed-4-asymmetric", lambda s: s.pop(f"{Q}.weight_zero_point"), "weight_zero_point is missing"),
        ("float-channel", lambda s: s.update({f"{Q}.weight_scale": torch.ones(1)}), r"shape \[1\]; expected \[64, 1\]"),
        ("float-channel", lambda s: s.update({f"{Q}.weight": torch.ones(64, 64)}), "stored as F32; expected F8_E4M3"),
        ("fp8-block", lambda s: s.pop(f"{Q}.weight_scale_inv"), "q_proj.weight_scale_inv is missing"),
        (
            "fp8-block",
            lambda s: s.update({f"{Q}.weight_scale_inv": torch.ones(3, 2)}),
            r"shape \[3, 2\], which fits neither the blocks",
        ),
        ("gptq", lambda s: [s.pop(n) for n in list(s) if n.endswith("qweight")], "holds no quantised weights"),
    ],
)
def test_damaged_tensors_get_a_sentence(
    layout: str, change: Callable[[dict[str, torch.Tensor]], Any], message: str, tiny: Folder, tmp_path: Path
) -> None:
    settings, write, _ = LAYOUTS[layout]
    quantise(tiny("llama"), tmp_path, settings, write)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def changed(layout: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return layout, {**LAYOUTS[layout][0], **more}


def regrouped(layout: str, weights: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    settings = LAYOUTS[layout][0]
    group = settings["config_groups"]["group_0"]
    return changed(layout, config_groups={"group_0": {**group, "weights": {**group["weights"], **weights}, **more}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed("gptq", quant_method="bitsandbytes"), "quantised by 'bitsandbytes', which is not read; read are gptq"),
        (changed("gptq", quant_method=None), "quantised by 'None', which is not read"),
        (changed("gptq", bits=5), "bits is '5' in the quantization_config of gptq; supported: 2, 3, 4, 8"),
        (changed("gptq", checkpoint_format="marlin"), "checkpoint_format is 'marlin'.*supported: gptq, gptq_v2"),
        (changed("gptq", is_marlin_format=True), "is_marlin_format is 'True'"),
        (changed("gptq", group_size="a"), "group_size is 'a'"),
        (changed("gptq", sym=1), "sym is '1'.*supported: True, False"),
        (changed("gptq", dynamic={"+:(": {"bits": 8}}), "dynamic is .*regular expressions"),
        (changed("awq", version="gemv"), "version is 'gemv'.*supported: gemm"),
        (changed("awq", bits=8), "bits is '8'.*supported: 4"),
        (changed("awq", zero_point=False), "zero_point is 'False'"),
        (changed("packed-4", format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'.*pack-quantized"),
        (changed("packed-4", quantization_status="frozen"), "quantization_status is 'frozen'"),
        (changed("packed-4", sparsity_config={"format": "sparse-24-bitmask"}), "weights that are sparse"),
        (changed("packed-4", transform_config={"R1": {}}), "rotations of activations"),
        (changed("packed-4", config_groups={}), "config_groups is"),
        (changed("packed-4", ignore=["re:.*q_proj"]), "q_proj is quantised and in the list of what is not"),
        (regrouped("packed-4", {"num_bits": 5}), "num_bits is '5'.*supported: 2, 3, 4, 8"),
        (regrouped("packed-4", {"type": "float", "num_bits": 8}), "type is 'float'.*int in pack-quantized"),
        (regrouped("packed-4", {"strategy": "token"}), "strategy is 'token'"),
        (regrouped("float-channel", {"num_bits": 4}), "num_bits is '4'.*supported: 8"),
        (changed("fp8-block", weight_block_size=[64]), "weight_block_size is"),
        (changed("fp8-block", fmt="e5m2"), "fmt is 'e5m2'"),
    ],
)
def test_settings_that_are_not_understood_get_a_sentence(
    given: tuple[str, dict[str, Any]], message: str, tiny: Folder, tmp_path: Path
) -> None:
    layout, settings = given
    quantise(tiny("llama"), tmp_path, settings, LAYOUTS[layout][1])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_groups_that_no_format_has_get_a_sentence(tiny: Folder, tmp_path: Path) -> None:
    quantise(tiny("llama"), tmp_path, {**GPTQ, "group_size": 16}, gptq(group=16))
    with pytest.raises(CheckpointError, match="the group of int4g16 is 16; allowed: multiples of 32"):
        open_checkpoint(tmp_path)


def test_zeros_that_are_not_the_middle_of_a_symmetric_gptq_weight_are_found(tiny: Folder, tmp_path: Path) -> None:
    quantise(tiny("llama"), tmp_path, GPTQ, gptq(symmetric=False))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="said to be symmetric and has zeros other than 8"):
        dequantize(checkpoint.tensor(f"{Q}.weight"))


def test_a_config_is_a_config_of_its_family(tiny: Folder, tmp_path: Path) -> None:
    quantise(tiny("qwen2"), tmp_path, GPTQ, gptq())
    assert model_config(open_checkpoint(tmp_path).config) == model_config(open_checkpoint(tiny("qwen2")).config)
