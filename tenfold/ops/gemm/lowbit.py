"""Linear operations on packed weights (`ops/formats.py`) in Triton, for one to thousands of tokens.

    y[t, r] = sum over c of x[t, c] * W[r, c] + bias[r]          W as `formats.unpack` gives it

Four kinds of implementation compete; `candidates` lists those that are legal, `plan` picks by rule, `run` runs one:

- "fused": codes become 16-bit numbers in registers, exactly, and meet the tokens in a tensor-core product. Scales
  multiply the sums of a tile in float32; only where groups are narrower than tiles they multiply the weights, which are
  then rounded to 16 bits. Zeros are taken from codes, in 16 bits, which is exact for whole ones; those of `FRACTIONS`
  times the sum of the tokens' columns from the sums of a tile.
- "dense": the weight is unpacked to 16 bits and handed to the library. Pays when many tokens share it.
- "fp8": tokens are rounded to e4m3, one scale each, and multiplied with float8 weights. Only for `a8` formats.
- "library": the same with the product by cuBLASLt (torch._scaled_mm), for which codes of 4 bits become float8 first,
  exactly. Only for `a8` formats with a scale a row and no zeros; in float16 "fp8" or "dense" in its place.

Split columns are added up by the block that comes last, in the order of the columns, so results repeat bit for bit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops import elementwise
from tenfold.ops.formats import BFLOAT_MAGIC, FP8_MAX, HALF_MAGIC, LEAST_TOKEN, Format, Packed, format_of, packed_of
from tenfold.ops.gpu.hopper import SHARED
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

# What makes a pair of codes a pair of numbers. Not a constant of the kernels: two constants would cost an instruction.
ABOVE = {torch.bfloat16: BFLOAT_MAGIC, torch.float16: HALF_MAGIC}
KINDS = ("fused", "dense", "fp8", "library")
CODES = {"int4": 0, "int8": 1, "fp8": 2, "int2": 3, "int3": 4, "int1": 5}
AT_END, SUMS, WEIGHTS = 0, 1, 2  # what scales multiply
NONE, FROM_CODES, FROM_SUMS = 0, 1, 2  # what zeros are taken from
FRACTIONS = ("int1",)  # whose zeros lie between the codes: rounded with these they would lose most of what they say
WHOLE_ROW = 1 << 30  # columns of a group, for kernels, where a row has one
SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000: the sign bits of a pair of 16-bit numbers
MOST_SUMS, MOST_COUNTERS = 1 << 24, 1 << 12  # numbers of a workspace; what `candidates` and `plan` may need
Rounded = tuple[Tensor, Tensor]  # of tokens, as `quantize_tokens` gives them
LEAST_LIBRARY = 16  # rows and columns are multiples of this for torch._scaled_mm
QUANTIZE_COLS = 8192  # columns of a token in registers at once


@dataclass(frozen=True, slots=True)
class LowbitPlan:
    """How one linear operation runs. Tile sizes in rows and columns of the weight and in tokens; splits of the columns;
    warps of a block; stages: tiles of columns under way. Kinds of a library use none of them.
    """

    kind: str
    rows: int = 64
    cols: int = 128
    tokens: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 4

    def __str__(self) -> str:
        if self.kind in ("dense", "library"):
            return self.kind
        return f"{self.kind}:{self.rows}x{self.cols}x{self.tokens}:s{self.splits}:w{self.warps}:n{self.stages}"


def parse(name: str) -> LowbitPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    kind, *parts = name.split(":")
    try:
        if kind not in KINDS or len(parts) != (0 if kind in ("dense", "library") else 4):
            raise ValueError
        if not parts:
            return LowbitPlan(kind)
        sizes = [int(n) for n in parts[0].split("x")]
        rows, cols, tokens = sizes
        return LowbitPlan(kind, rows, cols, tokens, int(parts[1][1:]), int(parts[2][1:]), int(parts[3][1:]))
    except ValueError:
        raise ValueError(
            f"{name!r} is no plan of a packed linear; allowed: dense, library, or fused or fp8 as "
            "fused:ROWSxCOLSxTOKENS:sSPLITS:wWARPS:nSTAGES."
        ) from None


class Workspace:
    """Memory for the sums of split columns, on one device; launches of one stream may share it, captured ones too: it
    never moves. The kernels leave counters at zero.
    """

    def __init__(self, device: torch.device, sums: int = MOST_SUMS, counters: int = MOST_COUNTERS) -> None:
        self.sums = torch.empty(sums, dtype=torch.float32, device=device)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)


def tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def candidates(rows: int, cols: int, batch: int, format: Format, sms: int) -> Iterator[LowbitPlan]:
    """Every plan worth measuring for `batch` tokens and a weight of `rows` x `cols` on a GPU of `sms` multiprocessors.

    All give the same result but for the order of sums and the roundings their kinds name.
    """
    tokens = min(128, max(16, 1 << (batch - 1).bit_length()))
    for kind in ("fused", "fp8"):
        if kind == "fp8" and not takes_fp8(format):
            continue
        for height in (64, 128):
            for width in (64, 128, 256):
                for splits in split_counts(rows, cols, batch, height, width, tokens, sms):
                    for warps, stages in ((4, 4), (8, 3)):
                        found = LowbitPlan(kind, height, width, tokens, splits, warps, stages)
                        if legal(found, rows, cols, format) and sensible(found, format):
                            yield found
    if batch > 32 or not legal(tiled("fused", rows, cols, batch, format, sms), rows, cols, format):
        yield LowbitPlan("dense")
    if takes_library(rows, cols, format):
        yield LowbitPlan("library")


def sensible(plan: LowbitPlan, format: Format) -> bool:
    """Whether sums and weights of a tile fit the registers of its warps, and tiles the groups where they can."""
    registers = plan.rows * plan.tokens <= 2048 * plan.warps and plan.rows * plan.cols <= 4096 * plan.warps
    return registers and (not format.group or plan.cols <= max(64, format.group))


def split_counts(rows: int, cols: int, batch: int, height: int, width: int, tokens: int, sms: int) -> tuple[int, ...]:
    """Splits of the columns that give about one to four blocks a multiprocessor, as far as there are tiles."""
    blocks = tiles(rows, height) * tiles(batch, tokens)
    most = max(1, tiles(cols, width) // 2)
    counts = [n for n in (1, 2, 4, 8, 16) if n <= most and (n == 1 or blocks * n <= 4 * sms)]
    return tuple(n for n in counts if 3 * blocks * n >= 2 * sms) or (counts[-1],)


def plan(rows: int, cols: int, batch: int, format: Format, sms: int) -> LowbitPlan:
    """The rule where nothing was measured: enough blocks to keep `sms` multiprocessors reading, tiles as large as that
    allows; many tokens go to the library.
    """
    if batch > (32 if format.kind == "fp8" else 256) and takes_library(rows, cols, format):
        return LowbitPlan("library")
    if batch > 32 and takes_fp8(format) and format.group % 64 == 0:
        return tiled("fp8", rows, cols, batch, format, sms)
    fused = tiled("fused", rows, cols, batch, format, sms)
    return LowbitPlan("dense") if batch > 256 or not legal(fused, rows, cols, format) else fused


def tiled(kind: str, rows: int, cols: int, batch: int, format: Format, sms: int) -> LowbitPlan:
    """The rule's tiles for "fused" or "fp8"."""
    tokens = min(128, max(16, 1 << (batch - 1).bit_length()))
    height = 64 if batch <= 64 else 128
    width = max(64, math.gcd(128, format.group or 128))
    blocks = tiles(rows, height) * tiles(batch, tokens)
    splits = max(1, min(16, 2 * sms // max(1, blocks), tiles(cols, width) // 4))
    splits = 1 << (splits.bit_length() - 1)
    return LowbitPlan(kind, height, width, tokens, splits, 4 if height <= 64 else 8, 4)


def legal(plan: LowbitPlan, rows: int, cols: int, format: Format) -> bool:
    """Whether a plan can run a weight of this shape and format."""
    if plan.kind == "dense":
        return True
    if plan.kind == "library":
        return takes_library(rows, cols, format)
    if shared_bytes(plan, format) > SHARED:
        return False
    within = not format.group or format.group % plan.cols == 0  # tiles lie within groups
    if plan.kind == "fp8":
        return takes_fp8(format) and within
    return within or plan.cols % format.group == 0


def shared_bytes(plan: LowbitPlan, format: Format) -> int:
    """Shared memory of a block, from above: tiles under way, and weights on their way to the tensor cores."""
    each = 1 if plan.kind == "fp8" else 2
    under_way = plan.stages * plan.cols * (plan.tokens * each + plan.rows * format.bits // 8)
    return under_way + (0 if plan.kind == "fp8" else plan.rows * plan.cols * 2)


def takes_fp8(format: Format) -> bool:
    return format.kind == "fp8" and format.activations == 8 and not format.order


def takes_library(rows: int, cols: int, format: Format) -> bool:
    plain = (
        format.activations == 8 and format.kind in ("fp8", "int4") and not (format.group or format.zero or format.order)
    )
    return plain and rows % LEAST_LIBRARY == 0 and cols % LEAST_LIBRARY == 0


def lowbit_linear(
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    *,
    plan: LowbitPlan | None = None,
    workspace: Workspace | None = None,
    sms: int = 132,
    rounded: Rounded | None = None,
) -> Tensor:
    """`x @ W.T + bias`: x [T, cols] bfloat16 or float16, contiguous; bias [rows] of any type -> [T, rows], like x.

    plan: None for the rule with `sms` multiprocessors. rounded: as `run` takes it. Raises ValueError for an x that does
    not fit, and for a plan that cannot run the weight.
    """
    format = format_of(w.format)
    if x.dim() != 2 or x.shape[1] != w.cols or x.dtype not in ABOVE or not x.is_contiguous():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; allowed: contiguous [T, {w.cols}] in bfloat16 or float16.")
    if plan is None:
        plan = rule(w.rows, w.cols, len(x), format, sms)
    if not legal(plan, w.rows, w.cols, format):
        raise ValueError(f"The plan {plan} cannot run a weight {w.rows} x {w.cols} of {w.format}.")
    return run(plan, x, w, bias, workspace, rounded, sms)


rule = plan


def rounds(plan: LowbitPlan) -> bool:
    """Whether the plan multiplies tokens rounded to float8."""
    return plan.kind in ("fp8", "library")


def run(
    plan: LowbitPlan,
    x: Tensor,
    w: Matrix,
    bias: Tensor | None,
    workspace: Workspace | None = None,
    rounded: Rounded | None = None,
    sms: int = 132,
) -> Tensor:
    """One legal plan; see `lowbit_linear`. rounded: x as a plan that `rounds` takes it, where that was made before."""
    format, packed = format_of(w.format), packed_of(w)
    if not len(x):
        return x.new_empty(0, w.rows)
    if plan.kind == "library" and x.dtype != torch.bfloat16:
        # The library gives bfloat16 only.
        wide = format.kind != "fp8"
        plan = LowbitPlan("dense") if wide else tiled("fp8", w.rows, w.cols, len(x), format, sms)
    if plan.kind == "dense":
        return F.linear(x, unpack_on_device(packed, format, w.rows, w.cols, x.dtype), _typed(bias, x.dtype))
    if plan.kind == "fused":
        return _launch(plan, format, packed, x, None, bias, w, x.dtype, workspace)
    codes, scales = rounded or quantize_tokens(x)
    if plan.kind == "library":
        return torch._scaled_mm(
            *(codes, eighths(packed, format, w.rows, w.cols).t()),
            scale_a=scales[:, None],
            scale_b=packed.scales.view(1, -1).float(),
            bias=_typed(bias, x.dtype),
            out_dtype=x.dtype,
        )
    return _launch(plan, format, packed, codes, scales, bias, w, x.dtype, workspace)


def linear(
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    *,
    plan: LowbitPlan | None = None,
    workspace: Workspace | None = None,
    sms: int = 132,
    rounded: Rounded | None = None,
) -> Tensor:
    """As `Kernels.linear`, norm, gate and residual in launches of their own. rounded: of x after the norm, for a plan
    that `rounds`.
    """
    if norm is not None and rounded is None:
        x = elementwise.norm(x, norm)
    y = lowbit_linear(x, w, bias, plan=plan, workspace=workspace, sms=sms, rounded=rounded)
    if act is not None:
        y = elementwise.act_mul(y, act)
    return y if residual is None else elementwise.add(y, residual)


def _typed(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _launch(
    plan: LowbitPlan,
    format: Format,
    packed: Packed,
    x: Tensor,
    token_scales: Tensor | None,
    bias: Tensor | None,
    w: Matrix,
    dtype: torch.dtype,
    workspace: Workspace | None,
) -> Tensor:
    tokens = len(x)
    out = torch.empty(tokens, w.rows, dtype=dtype, device=x.device)
    blocks = tiles(w.rows, plan.rows) * tiles(tokens, plan.tokens)
    parts = blocks * plan.splits if plan.splits > 1 else 0
    sums, counters = parts * plan.rows * plan.tokens, min(parts, blocks)
    if workspace is None:
        workspace = Workspace(x.device, sums, counters)
    if workspace.sums.numel() < sums or workspace.counters.numel() < counters:
        raise ValueError(f"The plan {plan} splits {tokens} tokens into more sums than the workspace holds; split less.")
    none = out  # what a kernel without that part is given and never reads
    product_kernel[(blocks, plan.splits)](
        *(x, packed.codes if token_scales is not None else packed.codes.view(torch.int32), packed.scales),
        none if packed.zeros is None else packed.zeros,
        none if packed.order is None else packed.order,
        none if bias is None else bias,
        none if token_scales is None else token_scales,
        *(out, workspace.sums, workspace.counters),
        *(tokens, w.rows, w.cols, packed.scales.shape[1], ABOVE[dtype]),
        CODE=CODES[format.kind],
        GROUP=format.group or WHOLE_ROW,
        SCALING=scaling(plan, format),
        ZERO=zeroing(format),
        MIDDLE=format.codes.middle,
        ORDER=packed.order is not None,
        BIAS=bias is not None,
        TOKEN_SCALES=token_scales is not None,
        EVEN=w.cols % plan.cols == 0,
        ROWS=plan.rows,
        COLS=plan.cols,
        TOKENS=plan.tokens,
        SPLITS=plan.splits,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return out


def scaling(plan: LowbitPlan, format: Format) -> int:
    """What scales multiply: AT_END, SUMS or WEIGHTS."""
    if plan.kind == "fp8" and not format.group:
        return AT_END
    # A row's one scale multiplies the sum of each tile, too: the compiler waits for every instruction of a product that
    # adds to the sums of the last one while weights come from registers (Triton 3.6, Hopper).
    return WEIGHTS if format.group and plan.cols > format.group else SUMS


def zeroing(format: Format) -> int:
    """What zeros are taken from where scales multiply sums: NONE, FROM_CODES or FROM_SUMS."""
    if not format.zero:
        return NONE
    return FROM_SUMS if format.kind in FRACTIONS else FROM_CODES


@triton.jit(do_not_specialize=["tokens", "groups", "above"])
def product_kernel(
    x,
    codes,
    scales,
    zeros,
    order,
    bias,
    token_scales,
    out,
    sums,
    counters,
    tokens,
    rows,
    cols,
    groups,
    above,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    SCALING: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    ORDER: tl.constexpr,
    BIAS: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of [rows, tokens]: weights on the side of the product that has room for 64 and more. EVEN: the columns
    are whole tiles.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    token_tiles = tl.cdiv(tokens, TOKENS)
    row = block // token_tiles * ROWS + tl.arange(0, ROWS)
    token = block % token_tiles * TOKENS + tl.arange(0, TOKENS)
    # What lies outside is computed from the last row or token and not stored: loads need no mask.
    near_row, near_token = tl.minimum(row, rows - 1), tl.minimum(token, tokens - 1)
    number = out.dtype.element_ty
    each = tl.cdiv(tl.cdiv(cols, COLS), SPLITS) * COLS
    last = tl.minimum((split + 1) * each, cols)
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for first in range(split * each, last, COLS):
        col = first + tl.arange(0, COLS)
        if EVEN:
            place = tl.load(order + col) if ORDER else col
            tile = tl.load(x + near_token[None, :].to(tl.int64) * cols + place[:, None])
        else:
            place = tl.load(order + col, mask=col < cols, other=0) if ORDER else col
            inside = (near_token < tokens)[None, :] & (col < cols)[:, None]
            tile = tl.load(x + near_token[None, :].to(tl.int64) * cols + place[:, None], mask=inside, other=0.0)
        w = load_codes(codes, near_row, first, cols, above, number, CODE, MIDDLE, TOKEN_SCALES, EVEN, ROWS, COLS)
        if SCALING == 2:
            w = weights_of(w, scales, zeros, near_row, first, groups, GROUP, ZERO != 0, MIDDLE, ROWS, COLS).to(number)
        elif ZERO == 1:
            w -= (load_groups(zeros, near_row, first, groups, GROUP, ROWS, COLS) - MIDDLE).to(number)
        if SCALING == 1:
            group = near_row * groups + first // GROUP
            s = tl.load(scales + group).to(tl.float32)
            part = tl.dot(w, tile)
            if ZERO == 2:
                z = tl.load(zeros + group).to(tl.float32) - MIDDLE
                part -= z[:, None] * tl.sum(tile.to(tl.float32), axis=0)[None, :]
            acc += part * s[:, None]
        elif TOKEN_SCALES:
            # Tensor cores add products of float8 in about 14 bits; what they add so is kept short.
            acc = tl.dot(w, tile, acc, max_num_imprecise_acc=COLS if COLS < 128 else 128)
        else:
            acc = tl.dot(w, tile, acc)
    if SPLITS > 1:
        size: tl.constexpr = ROWS * TOKENS
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(sums + (block * SPLITS + split).to(tl.int64) * size + at, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + block, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for other in range(SPLITS):
                acc += tl.load(sums + (block * SPLITS + other).to(tl.int64) * size + at, cache_modifier=".cg")
            tl.store(counters + block, 0)
            finish(acc, scales, bias, token_scales, out, row, token, rows, tokens, SCALING, BIAS, TOKEN_SCALES)
    else:
        finish(acc, scales, bias, token_scales, out, row, token, rows, tokens, SCALING, BIAS, TOKEN_SCALES)


@triton.jit
def finish(
    acc,
    scales,
    bias,
    token_scales,
    out,
    row,
    token,
    rows,
    tokens,
    SCALING: tl.constexpr,
    BIAS: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):
    """Scales that are left, bias, and the one rounding of the result."""
    row_in, token_in = row < rows, token < tokens
    if SCALING == 0:
        acc *= tl.load(scales + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    if TOKEN_SCALES:
        acc *= tl.load(token_scales + token, mask=token_in, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    where = out + token[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(where, acc.to(out.dtype.element_ty), mask=token_in[None, :] & row_in[:, None])


@triton.jit
def load_codes(
    codes,
    row,
    first,
    cols,
    above,
    number: tl.constexpr,
    CODE: tl.constexpr,
    MIDDLE: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Codes less MIDDLE of columns first .. first + COLS, as numbers [ROWS, COLS]. codes: int32 words, or with KEEP
    float8 that stays as it is; above: `ABOVE`.
    """
    # Columns of what is loaded, and words of that.
    each: tl.constexpr = 1 if KEEP else (8 if CODE == 0 else (16 if CODE == 3 else (32 if CODE >= 4 else 4)))
    words: tl.constexpr = 3 if CODE == 4 else 1
    count: tl.constexpr = COLS // each
    at = first // each + tl.arange(0, count)
    where = codes + row[:, None].to(tl.int64) * (cols // each * words) + (at * words)[None, :]
    if EVEN:
        loaded = tl.load(where)
    elif KEEP:
        loaded = tl.load(where, mask=(at * each < cols)[None, :] & (row >= 0)[:, None], other=0.0)
    else:
        loaded = tl.load(where, mask=(at * each < cols)[None, :] & (row >= 0)[:, None], other=0)
    if KEEP:
        numbers = loaded
    elif CODE == 3:
        numbers = spread_pairs(loaded, loaded, loaded, above, number, MIDDLE, 2, ROWS, COLS)
    elif CODE == 4:
        inside = (at * each < cols)[None, :] & (row >= 0)[:, None]
        second, third = tl.load(where + 1, mask=inside, other=0), tl.load(where + 2, mask=inside, other=0)
        numbers = spread_pairs(loaded, second, third, above, number, MIDDLE, 3, ROWS, COLS)
    elif CODE == 5:
        numbers = spread_pairs(loaded, loaded, loaded, above, number, MIDDLE, 1, ROWS, COLS)
    elif CODE == 0:
        numbers = spread_nibbles(loaded, above, number, MIDDLE, ROWS, COLS)
    else:
        numbers = spread_bytes(loaded, above, number, CODE, ROWS, COLS)
    return numbers


@triton.jit
def half(bits, index: tl.constexpr, number: tl.constexpr):
    """The 16-bit number in half `index` of each 32-bit word."""
    return (bits >> (16 * index)).to(tl.int16).to(number, bitcast=True)


@triton.jit
def spread_nibbles(words, above, number: tl.constexpr, MIDDLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 [ROWS, COLS / 8] -> [ROWS, COLS]. Column 4a + 2b + c of a word is half c of the pair 2a + b."""
    first = tl.join(nibble(words, above, 0, 0, number, MIDDLE), nibble(words, above, 2, 0, number, MIDDLE))
    second = tl.join(nibble(words, above, 0, 1, number, MIDDLE), nibble(words, above, 2, 1, number, MIDDLE))
    third = tl.join(nibble(words, above, 1, 0, number, MIDDLE), nibble(words, above, 3, 0, number, MIDDLE))
    fourth = tl.join(nibble(words, above, 1, 1, number, MIDDLE), nibble(words, above, 3, 1, number, MIDDLE))
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (ROWS, COLS))


@triton.jit
def nibble(words, above, pair: tl.constexpr, index: tl.constexpr, number: tl.constexpr, MIDDLE: tl.constexpr):
    """Column 2 * pair + index of each word, less MIDDLE: the bits of 128 (bfloat16) or 1024 (float16) above a code make
    it a number.
    """
    base: tl.constexpr = 128.0 if number == tl.bfloat16 else 1024.0
    return half(((words >> (4 * pair)) & 0x000F000F) | above, index, number) - (base + MIDDLE)


@triton.jit
def spread_pairs(
    first, second, third, above, number: tl.constexpr, MIDDLE: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Words of 2 bits, int32 [ROWS, COLS / 16] three times, of 1 bit, [ROWS, COLS / 32] three times, or words 0, 1 and
    2 of each 32 columns of 3 bits, [ROWS, COLS / 32] -> [ROWS, COLS].
    """
    even = tl.join(
        every_second(first, second, third, above, 0, 0, number, MIDDLE, BITS),
        every_second(first, second, third, above, 1, 0, number, MIDDLE, BITS),
    )
    odd = tl.join(
        every_second(first, second, third, above, 0, 1, number, MIDDLE, BITS),
        every_second(first, second, third, above, 1, 1, number, MIDDLE, BITS),
    )
    return tl.reshape(tl.join(even, odd), (ROWS, COLS))


@triton.jit
def every_second(
    first, second, third, above, low: tl.constexpr, index: tl.constexpr, number: tl.constexpr,
    MIDDLE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Half `index` of pairs low, low + 2, .. in their order: 4 of a word of 2 bits, 8 of one of 1 bit or of three words
    of 3 bits.
    """
    if BITS == 2:
        near = tl.join(
            pair_of(first, second, third, above, low, index, number, MIDDLE, BITS),
            pair_of(first, second, third, above, low + 4, index, number, MIDDLE, BITS),
        )
        far = tl.join(
            pair_of(first, second, third, above, low + 2, index, number, MIDDLE, BITS),
            pair_of(first, second, third, above, low + 6, index, number, MIDDLE, BITS),
        )
    else:
        near = tl.join(
            two_pairs(first, second, third, above, low, index, number, MIDDLE, BITS),
            two_pairs(first, second, third, above, low + 4, index, number, MIDDLE, BITS),
        )
        far = tl.join(
            two_pairs(first, second, third, above, low + 2, index, number, MIDDLE, BITS),
            two_pairs(first, second, third, above, low + 6, index, number, MIDDLE, BITS),
        )
    return tl.join(near, far)


@triton.jit
def two_pairs(
    first, second, third, above, low: tl.constexpr, index: tl.constexpr, number: tl.constexpr,
    MIDDLE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Half `index` of pairs low and low + 8 of sixteen."""
    return tl.join(
        pair_of(first, second, third, above, low, index, number, MIDDLE, BITS),
        pair_of(first, second, third, above, low + 8, index, number, MIDDLE, BITS),
    )


@triton.jit
def pair_of(
    first, second, third, above, pair: tl.constexpr, index: tl.constexpr, number: tl.constexpr,
    MIDDLE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Half `index` of one pair of codes of 1 to 3 bits, less MIDDLE; as `nibble`."""
    base: tl.constexpr = 128.0 if number == tl.bfloat16 else 1024.0
    if BITS == 1:
        bits = (first >> pair) & 0x00010001
    elif BITS == 2:
        bits = (first >> (2 * pair)) & 0x00030003
    elif pair == 15:
        bits = ((first >> 15) & 0x00010001) | ((second >> 14) & 0x00020002) | ((third >> 13) & 0x00040004)
    elif pair < 5:
        bits = (first >> (3 * pair)) & 0x00070007
    elif pair < 10:
        bits = (second >> (3 * (pair - 5))) & 0x00070007
    else:
        bits = (third >> (3 * (pair - 10))) & 0x00070007
    return half(bits | above, index, number) - (base + MIDDLE)


@triton.jit
def spread_bytes(words, above, number: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 [ROWS, COLS / 4] -> [ROWS, COLS]. Column 2h + o of a word is its byte o of half h."""
    even = tl.join(byte(words, above, 0, 0, number, CODE), byte(words, above, 1, 0, number, CODE))
    odd = tl.join(byte(words, above, 0, 1, number, CODE), byte(words, above, 1, 1, number, CODE))
    return tl.reshape(tl.join(even, odd), (ROWS, COLS))


@triton.jit
def byte(words, above, index: tl.constexpr, odd: tl.constexpr, number: tl.constexpr, CODE: tl.constexpr):
    """Low or odd byte of half `index` of each word, int8 or float8 e4m3, as a number; exact."""
    if CODE == 2:
        # The sign, and seven bits at the low end of exponent and mantissa: the value times a power of two, exactly,
        # smallest numbers included.
        high = words if odd else words << 8
        if number == tl.bfloat16:
            seven = words >> 4 if odd else words << 4
            value = half((high & SIGNS) | (seven & 0x07F007F0), index, number) * 1.329227995784916e36
        else:
            seven = words >> 1 if odd else words << 7
            value = half((high & SIGNS) | (seven & 0x3F803F80), index, number) * 256.0
    else:
        low = words >> 8 if odd else words
        if number == tl.bfloat16:
            # 128 + the low seven bits, less 128, or less 256 where the sign bit makes it the next power of two.
            value = half((low & 0x007F007F) | above, index, number) - half((low & 0x00800080) | above, index, number)
        else:
            value = half(((low & 0x00FF00FF) ^ 0x00800080) | above, index, number) - 1152.0
    return value


@triton.jit
def weights_of(
    w,
    scales,
    zeros,
    row,
    first,
    groups,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Codes less MIDDLE -> what they mean, float32 [ROWS, COLS]."""
    found = w.to(tl.float32)
    if ZERO:
        found -= load_groups(zeros, row, first, groups, GROUP, ROWS, COLS) - MIDDLE
    return found * load_groups(scales, row, first, groups, GROUP, ROWS, COLS)


@triton.jit
def load_groups(values, row, first, groups, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One number of each group of columns first .. first + COLS, repeated for its columns: float32 [ROWS, COLS]."""
    if COLS <= GROUP:
        one = tl.load(values + row * groups + first // GROUP).to(tl.float32)
        spread = tl.broadcast_to(one[:, None], (ROWS, COLS))
    else:
        count: tl.constexpr = COLS // GROUP
        group = tl.minimum(first // GROUP + tl.arange(0, count), groups - 1)
        each = tl.load(values + row[:, None] * groups + group[None, :]).to(tl.float32)
        spread = tl.reshape(tl.broadcast_to(each[:, :, None], (ROWS, count, GROUP)), (ROWS, COLS))
    return spread


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, cols] -> float8_e4m3fn codes [T, cols] and float32 scales [T]: the largest of a token becomes 448."""
    tokens, cols = x.shape
    codes = torch.empty(tokens, cols, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    width = min(QUANTIZE_COLS, triton.next_power_of_2(cols))
    warps = 4 if width <= 2048 else 8
    quantize_kernel[(tokens,)](x, codes, scales, cols, FP8_MAX, LEAST_TOKEN, COLS=width, num_warps=warps)
    return codes, scales


@triton.jit
def quantize_kernel(x, codes, scales, cols, limit, least, COLS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((COLS,), dtype=tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        values = tl.load(x + token * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    most = tl.max(largest)
    scale = most / limit
    tl.store(scales + token, scale)
    inverse = 1.0 / tl.where(most > least, scale, 1.0)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        values = tl.load(x + token * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(values * inverse, -limit), limit)
        tl.store(codes + token * cols + col, scaled.to(tl.float8e4nv), mask=col < cols)


def unpack_on_device(packed: Packed, format: Format, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The values of a packed weight, [rows, cols] in `dtype`, as `Format.unpack` in one pass."""
    out = torch.empty(rows, cols, dtype=dtype, device=packed.codes.device)
    # Of a block: near the best for 3, 4 and 8 bits and rows of 4,096 and 14,336 numbers (H200, 2026-11-30).
    height, width = 4, 1024
    if format.group and width % format.group and format.group % width:
        width = math.gcd(width, format.group)
    unpack_kernel[(tiles(rows, height), tiles(cols, width))](
        *(packed.codes.view(torch.int32), packed.scales),
        out if packed.zeros is None else packed.zeros,
        out if packed.order is None else packed.order,
        *(out, rows, cols, packed.scales.shape[1], ABOVE.get(dtype, HALF_MAGIC)),
        CODE=CODES[format.kind],
        GROUP=format.group or WHOLE_ROW,
        ZERO=packed.zeros is not None,
        MIDDLE=format.codes.middle,
        ORDER=packed.order is not None,
        ROWS=height,
        COLS=width,
    )
    return out


def eighths(packed: Packed, format: Format, rows: int, cols: int) -> Tensor:
    """Codes less their zero as float8 e4m3 [rows, cols], which has them all: of float8, or of 4 bits without zeros."""
    if format.kind == "fp8":
        return packed.codes
    ones = torch.ones(rows, 1, dtype=torch.float16, device=packed.codes.device)
    return unpack_on_device(Packed(packed.codes, ones), format, rows, cols, torch.float8_e4m3fn)


@triton.jit(do_not_specialize=["groups", "above"])
def unpack_kernel(
    codes,
    scales,
    zeros,
    order,
    out,
    rows,
    cols,
    groups,
    above,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    kind = out.dtype.element_ty
    number = kind if kind.primitive_bitwidth >= 16 else tl.float16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near_row = tl.minimum(row, rows - 1)
    first = tl.program_id(1) * COLS
    w = load_codes(codes, near_row, first, cols, above, number, CODE, MIDDLE, False, False, ROWS, COLS)
    w = weights_of(w, scales, zeros, near_row, first, groups, GROUP, ZERO, MIDDLE, ROWS, COLS).to(kind)
    col = first + tl.arange(0, COLS)
    place = tl.load(order + col, mask=col < cols, other=0) if ORDER else col
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * cols + place[None, :], w, mask=inside)
