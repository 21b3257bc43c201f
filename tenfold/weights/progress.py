"""A bar for downloads on the terminal's error stream; silent where that is no terminal."""

import sys
from types import TracebackType

from tenfold.base.log import logger


class Bar:
    """`with Bar(title, total) as bar: bar.show(done)`, in bytes."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total

    def __enter__(self) -> "Bar":
        logger.info("fetching %s, %d MiB", self.title, self.total >> 20)
        self._progress = None
        if sys.stderr.isatty():
            # Imported here: rich takes 0.1 s, and nearly no start downloads anything.
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (
                "{task.description}",
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._progress.start()
            self._task = self._progress.add_task(f"fetching {self.title}", total=self.total)
        return self

    def show(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
