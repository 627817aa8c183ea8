import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from registry.errors import ServerFailed
from registry.server import MlflowServer


def test_a_taken_port_is_named_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match=f"mlflow port={port}: cannot listen .* set service.mlflow.port"):
            MlflowServer(tmp_path, port=port).start()


def test_a_guard_that_cannot_start_says_why_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "approvals.pem").write_text("no key")
    (tmp_path / "keys" / "approvals.pem").chmod(0o600)
    server = MlflowServer(tmp_path, port=0)
    with pytest.raises(ServerFailed, match="holds no readable private key"):
        server.start()
    assert server.pid is None
    with pytest.raises(ServerFailed, match="not started"):
        server.check()


def test_it_dies_with_its_parent_however_that_dies(tmp_path):
    (tmp_path / "keys").mkdir()
    code = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from registry.server import MlflowServer
        server = MlflowServer(Path({str(tmp_path)!r}), port=0)
        server.start()
        print(server.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        line = next(line for line in parent.stdout if line.strip().isdecimal())
        family = [psutil.Process(int(line)), *psutil.Process(int(line)).children(recursive=True)]
        assert len(family) == 2
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(process) for process in family):
        time.sleep(0.1)
    assert not [process.pid for process in family if alive(process)]


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
