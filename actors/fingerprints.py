"""That every worker of a pool would get the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qdist.digest import canonical_json
from qdist.errors import StoreError


def refuse_mixed(fingerprint: Mapping[str, Any], facts: Iterable[Mapping[str, Any]]) -> None:
    """Raise QD407 for a worker of another execution fingerprint than what is stored is kept under.

    ``facts``: what workers said of themselves, as `actors.pool.WorkerPool.facts` has it.
    """
    wanted = canonical_json(fingerprint)
    for fact in facts:
        found = canonical_json(fact["fingerprint"])
        if found != wanted:
            raise StoreError(
                "QD407",
                where=f"worker {fact.get('worker')} on node {fact.get('node_ip')}",
                got=found,
                expected=wanted,
                mend="use nodes of one kind with one ONNX Runtime, or start the driver on such a "
                "node, so that all results agree to the last bit",
            )
