"""Every kind of adapter is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import Factory
from .trained import Kind, Trained, Training, train


@pytest.fixture(scope="session")
def trained(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """``trained(kind)``: its folders, for reading only."""
    made: dict[str, Trained] = {}

    def factory(kind: Kind) -> Trained:
        if repr(kind) not in made:
            made[repr(kind)] = train(kind, tiny_checkpoint, Path(tmp_path_factory.mktemp("trained")))
        return made[repr(kind)]

    return factory
