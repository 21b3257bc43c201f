"""One model in memory, and engines over it that differ in their settings, one after the other."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tenfold.base.config import EngineConfig
from tenfold.bench.engines import engine_config
from tenfold.engine.core import Engine
from tenfold.engine.memory import DTYPES
from tenfold.engine.opened import Opened
from tenfold.engine.phases.start import start
from tenfold.models.table import Model, build_model
from tenfold.weights.load import Weights
from tenfold.weights.shapes import at_least_positions, is_shape


class OneModel:
    """opened: the checkpoint; asked: its settings as they were given; longest: context of a sequence at most."""

    def __init__(self, model: str, device: str, longest: int, changes: Mapping[str, Any]) -> None:
        model = at_least_positions(model, longest) if is_shape(model) else model
        self.opened = Opened(engine_config(changes, model=model, device=device, prefix_cache=False))
        self.asked = self.opened.config
        self.opened.choose()
        config, checkpoint = self.opened.config, self.opened.checkpoint
        weights = Weights(checkpoint, self.opened.kernels, self.opened.device, DTYPES[config.dtype], config.weights)
        self.model: Model = build_model(checkpoint.config, weights, longest)

    def release(self) -> None:
        """Give back what the engine before this one had."""
        gc.collect()
        if self.opened.device.type == "cuda":
            torch.cuda.empty_cache()

    def engine_of(self, config: EngineConfig, pages: int) -> Engine:
        """config: with every size filled in. Graphs, and the store they keep, end with the engine."""
        self.opened.config = config
        stored = self.opened.groupings()
        return Engine(self.model.on(self.opened.kernels), self.opened.kernels, config, pages=pages, groupings=stored)

    def scheduled(self, pages: int, **changes: Any) -> Engine:
        """An engine whose phases have started, as `Engine.load` leaves it. changes: of settings."""
        self.release()
        engine = self.engine_of(replace(self.opened.config, **changes), pages)
        engine.warm_up()
        engine.phases = start(engine)
        return engine
