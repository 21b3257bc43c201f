"""One engine in a process of its own: `python -m tenfold.bench.worker ENGINE SETUP`, SETUP as JSON.

Requests and replies are JSON, one a line. Engines that take turns on a CPU must not share a process: their thread
pools would get in each other's way; nor must engines on a GPU that take all of its memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tenfold.bench.engines import Answer, Job, NotInstalled, Prompts, Setup, Timing, make_engine

LOG_BYTES = 4000  # of a log's end, shown where an engine fails


def serve(name: str, setup: Setup) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints goes to standard error

    def answer(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        engine = make_engine(name, setup)
    except Exception as error:
        answer(failure(error))
        return
    answer({"capacity": engine.capacity, "version": getattr(engine, "version", "")})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "jobs" in job:
                served: Any = engine
                answer({"answers": [asdict(one) for one in served.serve([Job(**one) for one in job["jobs"]])]})
            else:
                answer(asdict(engine.generate(job["prompts"], job["tokens"])))
        except Exception as error:  # a batch that does not fit ends itself, not the rounds after it
            answer(failure(error))


def failure(error: Exception) -> dict[str, Any]:
    """What is replied to the parent, which finds the traceback in the log. What is not installed needs none."""
    if isinstance(error, NotInstalled):
        return {"missing": str(error)}
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}"}


class Worker:
    """The parent's side of a worker process; an `Engine`. packages: a folder where it finds packages before others.

    What fails there is a RuntimeError here, with the other side's type and message, and the end of its log as a note;
    what is not installed there is NotInstalled here.
    """

    def __init__(self, name: str, setup: Setup, packages: str = "") -> None:
        given = {**asdict(setup), "settings": dict(setup.settings)}
        command = [sys.executable, "-m", "tenfold.bench.worker", name, json.dumps(given)]
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        if packages:
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH", "")]))
        if setup.threads:
            variables["OMP_NUM_THREADS"] = str(setup.threads)
        self.name = name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=variables
        )
        try:
            ready = self._read()
            self.capacity: int | None = ready["capacity"]
            self.version: str = ready["version"]  # of a peer's package
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} stopped: {self._printed()}")
        reply: dict[str, Any] = json.loads(line)
        if "missing" in reply:
            raise NotInstalled(reply["missing"])
        if "error" in reply:
            error = RuntimeError(f"{self.name}: {reply['error']}")
            error.add_note(self._printed())
            raise error
        return reply

    def _printed(self) -> str:
        """The end of its log, read without moving the place where the process writes on."""
        end = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), LOG_BYTES, max(0, end - LOG_BYTES)).decode(errors="replace").strip()

    def _asked(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._read()

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        return Timing(**self._asked({"prompts": [list(p) for p in prompts], "tokens": tokens}))

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        """What became of requests at their moments, with engines that can."""
        given = [{"due": job.due, "prompt": list(job.prompt), "tokens": job.tokens} for job in jobs]
        return [Answer(**one) for one in self._asked({"jobs": given})["answers"]]

    def told(self) -> list[str]:
        """What results note of it: its version, where it has one."""
        return [f"{self.name} is of version {self.version}"] if self.version else []

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self.log.close()


if __name__ == "__main__":
    serve(sys.argv[1], Setup(**json.loads(sys.argv[2])))
