"""One server for all, what the commands are given, and what they make of it when nothing goes wrong."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .inputs import COMMANDS, Inputs, files_of, make_inputs, write_source
from .server import Ended, Run, Server
from .trial import Trial

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
Reference = tuple[Ended, dict[str, bytes]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    with Server(write_source(folder / "source")) as started:
        yield started


@pytest.fixture(scope="session")
def inputs(server: Server, folder: Path) -> Inputs:
    return make_inputs(server, folder / "source", folder)


@pytest.fixture(scope="session")
def reference(server: Server, inputs: Inputs, folder: Path) -> Callable[[str], Reference]:
    """``reference(command)``: how an uninterrupted run ends, and all that it leaves."""
    made: dict[str, Reference] = {}

    def run(command: str) -> Reference:
        if command not in made:
            root = folder / f"reference {command}"
            root.mkdir()
            (ended,) = server.run(Run(inputs.arguments(command, root / "out"), str(root), inputs=inputs.folders))
            assert ended.code == 0, ended
            made[command] = ended, files_of(root)
        return made[command]

    return run


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> random.Random:
    """The same for each test in every run."""
    return random.Random(request.node.name)


@pytest.fixture(params=COMMANDS)
def trial(
    request: pytest.FixtureRequest,
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    tmp_path: Path,
    generator: random.Random,
) -> Trial:
    """Of every command in turn."""
    return Trial(server, inputs, request.param, *reference(request.param), tmp_path, generator)
