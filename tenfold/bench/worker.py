"""One engine in a process of its own: `python -m tenfold.bench.worker ENGINE SETUP`, SETUP as JSON.

Requests and replies are JSON, one a line. Engines that take turns on a CPU must not share a process: their thread
pools would get in each other's way; nor must engines on a GPU that take all of its memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tenfold.bench.engines import Answer, Job, Prompts, Setup, Timing, make_engine


def serve(name: str, setup: Setup) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints goes to standard error
    engine = make_engine(name, setup)
    print(json.dumps({"capacity": engine.capacity}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        reply: dict[str, Any]
        try:
            if "jobs" in job:
                served: Any = engine
                reply = {"answers": [asdict(one) for one in served.serve([Job(**one) for one in job["jobs"]])]}
            else:
                reply = asdict(engine.generate(job["prompts"], job["tokens"]))
        except Exception as error:  # a batch that does not fit ends itself, not the rounds after it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """The parent's side of a worker process; an `Engine`. packages: a folder where it finds packages before others."""

    def __init__(self, name: str, setup: Setup, packages: str = "") -> None:
        given = {**asdict(setup), "settings": dict(setup.settings)}
        command = [sys.executable, "-m", "tenfold.bench.worker", name, json.dumps(given)]
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        if packages:
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH", "")]))
        if setup.threads:
            variables["OMP_NUM_THREADS"] = str(setup.threads)
        self.name = name
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=variables
        )
        try:
            self.capacity: int | None = self._read()["capacity"]
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

    def _asked(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        reply = self._read()
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}")
        return reply

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        return Timing(**self._asked({"prompts": [list(p) for p in prompts], "tokens": tokens}))

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        """What became of requests at their moments, with engines that can."""
        given = [{"due": job.due, "prompt": list(job.prompt), "tokens": job.tokens} for job in jobs]
        return [Answer(**one) for one in self._asked({"jobs": given})["answers"]]

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self.log.close()


if __name__ == "__main__":
    serve(sys.argv[1], Setup(**json.loads(sys.argv[2])))
