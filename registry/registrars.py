"""Who registered which version: written by the guard from the login of the request, where no client can write.

A tag could be set by whoever registers, so four eyes cannot rest on one. A row is written once and never changed; it
stands beside the history of approvals.
"""

from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from registry.approvals import now
from registry.errors import ApprovalsError

_metadata = MetaData()
_table = Table(
    "tidegate_registrars",
    _metadata,
    Column("model", String(256), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("who", String(256), nullable=False),
    Column("at", String(32), nullable=False),
)


class Registrars:
    """Who registered what.

    Args:
        url: SQLAlchemy URL of the history of approvals.
    """

    def __init__(self, url: str) -> None:
        # No pool: a row a round, and a connection that outlives its thread is a warning at exit.
        self._engine = create_engine(url, poolclass=NullPool)
        try:
            _metadata.create_all(self._engine)
        except SQLAlchemyError as error:
            raise ApprovalsError(f"registrars={self._engine.url!r}: cannot be made ({error})") from error

    def note(self, model: str, version: int, who: str) -> None:
        """Write down who registered a version; the first word counts.

        Raises:
            ApprovalsError: the database cannot be written.
        """
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(_table).values(model=model, version=version, who=who, at=now()))
        except IntegrityError:
            return
        except SQLAlchemyError as error:
            raise ApprovalsError(f"registrars={self._engine.url!r}: cannot be written ({error})") from error

    def of(self, model: str, version: int) -> str | None:
        """Who registered a version; None when it was registered without a login.

        Raises:
            ApprovalsError: the database cannot be read.
        """
        query = select(_table.c.who).where(_table.c.model == model, _table.c.version == version)
        try:
            with self._engine.connect() as connection:
                found = connection.execute(query).scalar_one_or_none()
        except SQLAlchemyError as error:
            raise ApprovalsError(f"registrars={self._engine.url!r}: cannot be read ({error})") from error
        return None if found is None else str(found)
