"""How a model's keys and values are to be grouped and clipped, measured by `tenfold calibrate kv`: numbers in a
.safetensors file, and what they belong to in a .json file of the same name.

Both lie where `beside` says, one pair for each KV format. The JSON is written last and holds the digest of the numbers,
so that halves of two runs never meet.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tenfold.weights import beside
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.identity import identity
from tenfold.weights.safetensors import SafetensorsFile, serialize

SCHEMA = 1
LARGEST_FILE = 256 << 20  # bytes
SIDES = ("keys", "values")


@dataclass(frozen=True, slots=True)
class KvHeader:
    """model: `identity` of the checkpoint; text: digest of the calibration text; tokens: of all windows; format: name
    of the KV format, whose groups and clip factors these are; tensors: digest of the numbers, which also names the
    calibration wherever packed pages of two must not be mixed.
    """

    model: str
    text: str
    tokens: int
    format: str
    tensors: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class KvCalibration:
    """tensors: `{keys,values}.{group,clip,unit,shift}`, of all layers stacked: group [layers, channels] int32, clip and
    unit [layers, groups] float32, shift [layers, channels] float32 (see `ops.kv.quantize.Grouping`).
    """

    header: KvHeader
    tensors: dict[str, Tensor]


def places(checkpoint: Checkpoint, model: str, format: str) -> list[Path]:
    """Where the .json of a format may lie, best first; model: the checkpoint's identity."""
    return beside.places(checkpoint, model, "kv", format)


def save(calibration: KvCalibration, checkpoint: Checkpoint) -> Path:
    """Write both files to the first place that takes them; the path of the .json. Raises OSError where none does."""
    content = serialize(calibration.tensors)
    header = {"schema": SCHEMA, **asdict(calibration.header), "tensors": hashlib.sha256(content).hexdigest()}

    def put(path: Path) -> None:
        beside.write(path.with_suffix(".safetensors"), content)
        beside.write(path, json.dumps(header, indent=1).encode())

    return beside.save("kv", places(checkpoint, calibration.header.model, calibration.header.format), put)


def load(checkpoint: Checkpoint, format: str, layers: int, channels: int, groups: int) -> KvCalibration:
    """What was measured of a checkpoint for a format, the first that is usable. Raises ValueError that says what to do
    where nothing is: a cache in few bits without its calibration is not what was asked for.
    """
    model = identity(checkpoint)
    again = f"run `tenfold calibrate kv MODEL --text FILE --format {format}`"
    wrong = []
    for path in filter(Path.is_file, places(checkpoint, model, format)):
        try:
            return read(path, model, format, (layers, channels, groups))
        except (OSError, RecursionError) as error:
            wrong.append(f"{path} cannot be read ({error})")
        except ValueError as error:
            wrong.append(f"{path} is not used, {error}")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; {again}.")
    raise ValueError(
        f"{checkpoint.path} has no calibration for the KV format {format}, which is refused without; {again}, or take "
        "fp8 or int4, which need none."
    )


def read(path: Path, model: str, format: str, sizes: tuple[int, int, int]) -> KvCalibration:
    """sizes: layers, channels, groups. Raises ValueError with what is wrong with the files."""
    numbers = path.with_suffix(".safetensors")
    if max(path.stat().st_size, numbers.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise ValueError("it is no file of this version")
    if set(content) != set(KvHeader.__slots__) or type(content["tokens"]) is not int:
        raise ValueError("it has other entries than a calibration has")
    if content["model"] != model:
        raise ValueError("it was measured with another model")
    if content["format"] != format:
        raise ValueError(f"it is of the KV format {str(content['format'])[:80]}")
    if content["tensors"] != hashlib.sha256(numbers.read_bytes()).hexdigest():
        raise ValueError(f"{numbers.name} is not the file it was written with")
    file = SafetensorsFile(numbers)
    tensors = {name: file.part(name).clone() for name in file.tensors}
    check(tensors, *sizes)
    return KvCalibration(KvHeader(**content), tensors)


def check(tensors: dict[str, Tensor], layers: int, channels: int, groups: int) -> None:
    """Raises ValueError for numbers that are no calibration of so many layers, channels and groups."""
    widths = {"group": channels, "clip": groups, "unit": groups, "shift": channels}
    wanted = {f"{side}.{part}": (layers, width) for side in SIDES for part, width in widths.items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != wanted:
        raise ValueError(f"its numbers are not those of {layers} layers of {channels} channels in {groups} groups")
    for name, tensor in tensors.items():
        if tensor.dtype != (torch.int32 if name.endswith("group") else torch.float32) or not tensor.isfinite().all():
            raise ValueError(f"{name} is of another type, or not finite")
    for side in SIDES:
        group, clip, unit = (tensors[f"{side}.{part}"] for part in ("group", "clip", "unit"))
        sizes = torch.stack([(group == i).sum(1) for i in range(groups)])
        if not (sizes == channels // groups).all():
            raise ValueError(f"the groups of its {side} are not of equal size")
        if not ((clip > 0) & (clip <= 1)).all() or not (unit > 0).all():
            raise ValueError(f"the clip factors or units of its {side} are out of range")


def key_bias(checkpoint: Checkpoint, layer: int, channels: int) -> Tensor:
    """What k_proj adds to every key of a layer, [channels] float32: nothing is lost when it is taken off before keys
    are rounded. Zeros where it has no bias, or a norm follows it.
    """
    prefix, names = f"model.layers.{layer}.self_attn.", frozenset(checkpoint.names())
    if f"{prefix}k_proj.bias" not in names or f"{prefix}k_norm.weight" in names:
        return torch.zeros(channels)
    return checkpoint.tensor(f"{prefix}k_proj.bias").data.float().clone()
