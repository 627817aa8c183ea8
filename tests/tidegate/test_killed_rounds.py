"""The soak of killed rounds in small, in a process of its own, and in full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def soak(kills):
    """A process of its own: it forks, which no process that has used torch's threads may."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.tidegate.killed_rounds", "--kills", str(kills)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills in " in done.stdout


def test_rounds_that_are_killed_end_once_are_charged_once_and_end_in_the_same_bytes():
    soak(6)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fifty_kills():
    soak(50)
