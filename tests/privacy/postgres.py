"""A PostgreSQL server of our own for the tests: unprivileged, on a socket in a temporary folder, gone afterwards."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Debian's place; elsewhere the programs are on PATH.
BINARIES = Path("/usr/lib/postgresql/15/bin")


def binary(name: str) -> str | None:
    own = BINARIES / name
    return str(own) if own.exists() else shutil.which(name)


def unprivileged() -> str | None:
    """postgres refuses to run as root; any other user starts it as itself."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def server() -> Iterator[Path]:
    """The folder of the socket of a running server."""
    user = unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        shutil.chown(folder, user)
    data = folder / "data"

    def run(*arguments):
        # The server inherits these streams: a pipe would keep the caller waiting for its end.
        quiet = subprocess.DEVNULL
        subprocess.run(arguments, user=user, check=True, cwd=folder, stdout=quiet, stderr=quiet)

    try:
        run(binary("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(binary("pg_ctl"), "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield folder
        finally:
            run(binary("pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(folder: Path, name: str) -> str:
    """SQLAlchemy URL of a fresh database."""
    import psycopg

    with psycopg.connect(host=str(folder), user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql+psycopg://postgres@/{name}?host={folder}"
