"""One engine in a process of its own: `python -m tenfold.bench.worker ENGINE MODEL THREADS BATCH CONTEXT`.

Requests and replies are JSON, one a line. Engines that take turns must not share a process: their thread pools would
get in each other's way.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tenfold.bench.engines import Timing, make_engine


def serve(arguments: Sequence[str]) -> None:
    name, model, threads, batch, context = arguments
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints goes to standard error
    engine = make_engine(name, model, int(threads), int(batch), int(context))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(asdict(engine.generate(job["prompts"], job["tokens"]))), file=replies, flush=True)


class Worker:
    """The parent's side of a worker process."""

    def __init__(self, name: str, model: str, threads: int, batch: int, context: int) -> None:
        command = [sys.executable, "-m", "tenfold.bench.worker", name, model, str(threads), str(batch), str(context)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.name = name
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name} stopped: {self.log.read().strip()[-2000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": [list(p) for p in prompts], "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return Timing(**self._read())

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self.log.close()


if __name__ == "__main__":
    serve(sys.argv[1:])
