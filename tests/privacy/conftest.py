import itertools
import os
import tempfile
from pathlib import Path

import pytest

from privacy.ledger import Ledger
from tests.privacy import postgres
from tests.privacy.rounds import POLICY

_numbers = itertools.count()


@pytest.fixture
def quick(tmp_path):
    """A folder in memory where there is one: most tests do not ask whether a disk keeps what it is told."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server():
    if postgres.binary("initdb") is None:
        reason = "PostgreSQL is missing: install the server's programs (initdb, pg_ctl)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with postgres.server() as folder:
        yield folder


@pytest.fixture
def postgres_url(server):
    return postgres.new_database(server, f"ledger{next(_numbers)}")


@pytest.fixture
def sqlite_url(quick):
    return f"sqlite:///{quick / 'ledger.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    """One contract, on both databases."""
    return request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")


def with_blocks(url):
    made = Ledger(url)
    for name in ("b1", "b2", "b3"):
        made.register_block("s", name, POLICY.frozen(500))
    return made


@pytest.fixture
def ledger(url):
    made = with_blocks(url)
    yield made
    made.close()


@pytest.fixture
def sqlite_ledger(sqlite_url):
    made = with_blocks(sqlite_url)
    yield made
    made.close()
