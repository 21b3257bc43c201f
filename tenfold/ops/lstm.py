"""A bidirectional LSTM (Hochreiter and Schmidhuber 1997; gates in PyTorch's order) on a GPU, without packing: lengths
stay on the device, so that it can be captured in a CUDA graph.

The products with the input are one product for all places and both directions. What is left of a step, the product
with the state before it and the cell, is one launch for both directions: the backward one begins at the last token of
each text. States are kept where the results are, cells in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

POSTS, UNITS, COLUMNS = 16, 16, 64  # of a program, and of the state that it multiplies at a time


class Layer(NamedTuple):
    """input [2 * 4 * H, d] and bias [2 * 4 * H] of both directions; recurrent [2, 4, H, H]."""

    input: Tensor
    bias: Tensor
    recurrent: Tensor


def layers_of(lstm: nn.LSTM) -> list[Layer]:
    """The weights of a bidirectional LSTM of PyTorch, copied."""
    found = []
    for i in range(lstm.num_layers):
        own = {
            name: [getattr(lstm, f"{name}_l{i}{end}").detach() for end in ("", "_reverse")]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        bias = torch.cat([*own["bias_ih"]]) + torch.cat([*own["bias_hh"]])
        recurrent = torch.stack(own["weight_hh"]).unflatten(1, (4, -1))
        found.append(Layer(torch.cat(own["weight_ih"]), bias, recurrent.contiguous()))
    return found


def bidirectional(x: Tensor, lengths: Tensor, layers: Sequence[Layer]) -> Tensor:
    """x [B, L, d], lengths [B] int64 on its device, from 1 to L -> [B, L, 2 * H] in x's type, the forward direction
    first; zeros behind a text's end, whatever x has there.
    """
    for layer in layers:
        x = _layer(x, lengths, layer)
    return x


def _layer(x: Tensor, lengths: Tensor, layer: Layer) -> Tensor:
    count, length, _ = x.shape
    width = layer.recurrent.shape[-1]
    gates = F.linear(x, layer.input, layer.bias)
    out = x.new_zeros(count, length, 2 * width)
    cells = torch.empty(2, count, width, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(count, POSTS), triton.cdiv(width, UNITS), 2)
    for step in range(length):
        step_kernel[grid](
            gates, layer.recurrent, out, cells, lengths, step, count, length,
            WIDTH=width, POSTS=POSTS, UNITS=UNITS, COLUMNS=COLUMNS, num_warps=2,
        )  # fmt: skip
    return out


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 * sigmoid(2 * x) - 1


@triton.jit(do_not_specialize=["step", "count", "length"])
def step_kernel(
    gates, recurrent, out, cells, lengths, step, count, length,
    WIDTH: tl.constexpr, POSTS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Token number `step` of each text, seen from the end where a direction begins."""
    posts = tl.program_id(0) * POSTS + tl.arange(0, POSTS)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    way = tl.program_id(2)
    own = tl.load(lengths + posts, mask=posts < count, other=0).to(tl.int32)
    live = step < own
    place = tl.where(way == 0, step, own - 1 - step)
    before = tl.where(way == 0, place - 1, place + 1)
    rows = posts.to(tl.int64) * length
    there = units < WIDTH
    inside = live[:, None] & there[None, :]

    first = gates + ((rows + place) * 2 + way)[:, None] * (4 * WIDTH) + units[None, :]
    i = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(first + WIDTH, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(first + 2 * WIDTH, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(first + 3 * WIDTH, mask=inside, other=0.0).to(tl.float32)
    own_cells = cells + (way * count + posts)[:, None] * WIDTH + units[None, :]
    cell = tl.zeros([POSTS, UNITS], tl.float32)
    if step > 0:
        cell = tl.load(own_cells, mask=inside, other=0.0)
        states = out + ((rows + before) * 2 + way)[:, None] * WIDTH
        weights = recurrent + (way * 4 * WIDTH + units)[None, :] * WIDTH
        for column in range(0, WIDTH, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            state = tl.load(states + columns[None, :], mask=live[:, None] & (columns < WIDTH)[None, :], other=0.0)
            read = (columns < WIDTH)[:, None] & there[None, :]
            at = weights + columns[:, None]
            i = tl.dot(state, tl.load(at, mask=read, other=0.0), i, input_precision="ieee")
            f = tl.dot(state, tl.load(at + WIDTH * WIDTH, mask=read, other=0.0), f, input_precision="ieee")
            g = tl.dot(state, tl.load(at + 2 * WIDTH * WIDTH, mask=read, other=0.0), g, input_precision="ieee")
            o = tl.dot(state, tl.load(at + 3 * WIDTH * WIDTH, mask=read, other=0.0), o, input_precision="ieee")
    cell = sigmoid(f) * cell + sigmoid(i) * tanh(g)
    tl.store(own_cells, cell, mask=inside)
    state = sigmoid(o) * tanh(cell)
    at = out + ((rows + place) * 2 + way)[:, None] * WIDTH + units[None, :]
    tl.store(at, state.to(out.dtype.element_ty), mask=inside)
