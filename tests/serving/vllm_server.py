"""A vLLM for tests and benchmarks, as `tidegate vllm` starts it; killed and started again at will."""

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from ingest.child import die_with_parent
from learner.base import Base
from tidegate.vllm import ENVIRONMENT, command, environment

KEY = "sesame"
START_S = 300
# Of the embedded base's size, and quick to set up.
SMALL = ("--max-model-len", "512", "--enforce-eager")


def python():
    """Of the environment with vLLM, which may be elsewhere; None when there is none."""
    found = ENVIRONMENT / "bin" / "python"
    return found if found.exists() else None


@dataclass
class VllmServer:
    base: Base
    log: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        words = command(python(), self.base, self.url, rank=16, dtype="float32", more=SMALL)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                words,
                env=environment(KEY),
                stdout=out,
                stderr=out,
                cwd=self.log.parent,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - only prctl is called
            )
        end = time.monotonic() + START_S
        while not self.well():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def well(self):
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self):
        """SIGKILL to it and its workers at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def get(self, path):
        return httpx.get(f"{self.url}{path}", headers={"authorization": f"Bearer {KEY}"}, timeout=30)

    def loras(self):
        """Names of the adapters it has."""
        return {model["id"] for model in self.get("/v1/models").json()["data"] if model["parent"]}

    def running(self):
        """Requests it works on or keeps waiting."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(names)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def memory_mb(self):
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) / 2**20


@contextmanager
def vllm_server(base, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = VllmServer(base, folder / "vllm.log", probe.getsockname()[1])
    try:
        server.start()
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
