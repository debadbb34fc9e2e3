"""What a store consists of (schema 2): its objects, their names, and how each says it is whole.

::

    zarr.json                           root group; attributes: schema and identity
    tapsets/<tap set>.json              names of the tensors that one run measured
    records/<receipt>.<write>.<sha>.zip one record: a Zarr group, see `container`
    receipts/<receipt>.json             which samples and tap set, and where the record is
    inner/<node>.<write>.<sha>.zip      the merge of some shards' records: an inner node of a merge
    nodes/<node>.json                   where the inner node of this name is
    merges/<name>.<write>.<sha>.zip     a merged record with its taps and micro-batches
    finished/<name>.json                where the merge of this name is
    documents/<name>.json               small JSON values of others
    spool/<plan>-<cut>-<micro-batch>    what waits between the stages of a pipeline, for a while
    sensitivities/<id>.<write>.<sha>.zip  how far layers move when quantized, see `sensitivities`
    head.json                           name of the last finished merge

A record comes first, under a name of its own that carries the SHA-256 of its bytes; its receipt is
created last, only if absent. So a shard's commit is two objects (and the tap set once), the first
complete result wins, and half of one never counts. No record is ever written again, and only what
nobody can want is deleted. Inner nodes are kept in the same way, and made again where they are
lost. JSON documents carry the digest of what they say.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from qdist.digest import digest_json
from qdist.store.container import UNREADABLE
from qdist.store.identity import Identity

SCHEMA = 2
ROOT = "zarr.json"
HEAD = "head.json"
TAP_SETS, RECORDS, RECEIPTS = "tapsets", "records", "receipts"
MERGES, FINISHED, DOCUMENTS = "merges", "finished", "documents"
INNER, NODES = "inner", "nodes"
SPOOL = "spool"
SENSITIVITIES = "sensitivities"

_NODES_OF = "nodes-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_WRITE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)\.([0-9a-f]{16})\.([0-9a-f]{64})\.zip")


def json_key(folder: str, name: str) -> str:
    """Where the JSON document ``name`` is. Raises `ValueError` for what is no plain name."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r}: letters, digits, - and _ make a name, 128 at most")
    return f"{folder}/{name}.json"


def nodes_document(merge: str) -> str:
    """Name of the document that lists the inner nodes of a finished merge."""
    return f"{_NODES_OF}{merge}"


def merge_of_nodes(document: str) -> str | None:
    """The merge that a document of `nodes_document` belongs to; None for any other document."""
    return document.removeprefix(_NODES_OF) if document.startswith(_NODES_OF) else None


def write_key(folder: str, name: str, sha256: str) -> str:
    """A new place for a container. Raises `ValueError` for what is no plain name."""
    key = f"{folder}/{name}.{uuid.uuid4().hex[:16]}.{sha256}.zip"
    if _NAME.fullmatch(name) is None or written(folder, key) is None:
        raise ValueError(f"{name!r} and {sha256!r} make no key")
    return key


def written(folder: str, key: str) -> tuple[str, str] | None:
    """Name and SHA-256 that a key of `write_key` carries; None for any other."""
    parent, _, file = key.rpartition("/")
    match = _WRITE.fullmatch(file)
    return (match[1], match[3]) if match is not None and parent == folder else None


def root_document(identity: Identity) -> bytes:
    """The root group's metadata."""
    own = {"schema": SCHEMA, "kind": "calibration", "identity": identity.to_json()}
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"qdist": own}}
    return json.dumps(document).encode()


def root_attributes(data: bytes) -> dict[str, Any] | None:
    """What the root says about the store; None where it is not the root of one."""
    try:
        return dict(json.loads(data)["attributes"]["qdist"])
    except UNREADABLE:
        return None


def sealed(value: Any) -> bytes:
    """A JSON document that says what its own digest is."""
    return json.dumps({"value": value, "sha256": digest_json(value)}, allow_nan=False).encode()


def unsealed(data: bytes | None) -> Any:
    """What was `sealed`; None for anything else, and for a document that was changed since."""
    if data is None:
        return None
    try:
        document = json.loads(data)
        value = document["value"]
        return value if digest_json(value) == document["sha256"] else None
    except UNREADABLE:
        return None
