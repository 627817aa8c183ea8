"""The auditor's question: what was spent on whose data, under which guarantee, recomputed from the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidegate.cycle import require_whole_ledger
from tidegate.planning import register_blocks

if TYPE_CHECKING:
    from tidegate.wiring import Service


def examine(service: Service, stream: str | None) -> dict[str, Any]:
    """Verify ledger, receipts and approvals, then recompute every block's spending.

    Raises:
        UnknownName: no such stream.
        PrivacyError, RegistryError: the first thing whose hash or signature does not match.
    """
    from privacy.audit import audit

    names = [stream] if stream else list(service.settings.streams)
    for name in names:
        service.stream(name)
        repo = service.repository()
        register_blocks(service, name, repo.pin(name))
    verified = [f"ledger: hash chain of {service.ledger.verify_chain()} rows, head {service.ledger.head()[:16]}"]
    receipts = require_whole_ledger(service)
    verified.append(f"receipts: {receipts} signatures, each anchored in the ledger's chain")
    verified.append(
        f"approvals: {service.approvals().verify(service.trusted('approvals'))} signatures and their hash chain"
    )
    streams = {}
    for name in names:
        report = audit(service.ledger, name).as_json()
        streams[name] = report
    return {"verified": verified, "streams": streams}
