"""The index of a sharded checkpoint: which file holds which tensor."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pissa_hub.checkpoint.header import Header
from pissa_hub.checkpoint.strict_json import parse_object, shown
from pissa_hub.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 25_000_000
MAX_INDEX_VALUES = 300_000

_SHARD_NAME = re.compile(r"(?!\.)[^/\\:]{1,200}\.safetensors")
_REMEDY = "download the checkpoint again"


def parse_index(path: PurePath, data: bytes) -> dict[str, Any]:
    """The index as stored, its ``weight_map`` checked to map tensor names to bare file names.

    Args:
        path: the index, for messages.
        data: its bytes.

    Raises:
        CheckpointError: it is malformed, or names a file elsewhere.
    """
    try:
        index = parse_object(data, MAX_INDEX_VALUES)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}", _REMEDY) from None
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{path} has metadata that are no object", _REMEDY)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map", _REMEDY)
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path} maps tensor {shown(name)} to no file name", _REMEDY)
        # The string itself is judged, not what it resolves to: shards in the Hub's cache are links to blobs.
        if not _SHARD_NAME.fullmatch(file) or not file.isprintable():
            fact = f"{path} maps tensor {shown(name)} to {shown(file)}, which is no bare .safetensors file name"
            raise CheckpointError(fact, "do not use this checkpoint: its index may be hostile")
    return index


def check_index(path: PurePath, index: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Check that a parsed index and the headers of its files, by file name, hold the same tensors.

    Raises:
        CheckpointError: a file lacks a tensor that the index promises, or holds one that it does not name.
    """
    weight_map = index["weight_map"]
    for name, file in weight_map.items():
        if name not in headers[file]:
            fact = f"{path.parent / file} lacks tensor {shown(name)}, which {path.name} promises"
            raise CheckpointError(fact, _REMEDY)
    for file, header in headers.items():
        for entry in header.entries:
            if entry.name not in weight_map:
                fact = f"{path.parent / file} holds tensor {shown(entry.name)}, which {path.name} does not name"
                raise CheckpointError(fact, _REMEDY)
