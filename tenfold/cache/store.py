"""The KV store: one allocation for all layers, cut into pages. Who owns a page is decided in `pages.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What the cache of a model looks like. `dtype` is the stored type of keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size


class KVStore:
    """Keys and values of all layers, `keys[layer]` and `values[layer]` each [pages, kv_heads, page_size, head_dim].

    A slot number is `page * page_size + offset`. Contents of a page nobody owns are undefined.
    """

    def __init__(self, spec: KVSpec, pages: int, device: torch.device) -> None:
        self.spec = spec
        self.pages = pages
        shape = (spec.layers, pages, spec.kv_heads, spec.page_size, spec.head_dim)
        self._keys = torch.empty(shape, dtype=spec.dtype, device=device)
        self._values = torch.empty(shape, dtype=spec.dtype, device=device)
        self.keys = list(self._keys.unbind(0))
        self.values = list(self._values.unbind(0))

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages in every layer; `sources`, `targets` [N] int64 page numbers on the store's device."""
        self._keys[:, targets] = self._keys[:, sources]
        self._values[:, targets] = self._values[:, sources]
