"""A checkpoint of several shards, and what one process makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pissa_hub import decompose

from ..conftest import SHARDED, Factory
from ..helpers import files_of


@pytest.fixture(scope="session")
def sharded(tiny_checkpoint: Factory) -> Path:
    """For reading only."""
    return tiny_checkpoint(shard_size=SHARDED)


@pytest.fixture(scope="session")
def sharded_by_one(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of its decomposition of rank 4 by one process with one thread."""
    output = tmp_path_factory.mktemp("reference") / "out"
    decompose(sharded, output, rank=4)
    return files_of(output)
