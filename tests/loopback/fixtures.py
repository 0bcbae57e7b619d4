"""A fixture that starts loopback Hubs; a test module imports it from here, or a conftest does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants

from .server import NO_PROXY, LoopbackHub, Storage


@pytest.fixture
def loopback_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LoopbackHub]]:
    """``loopback_hub(storage="basic", folder=None)``: a running hub, stopped when the test ends.

    Clients in the test's own process, ``HfApi(endpoint=hub.endpoint, token=hub.token)``, use the storage it asks for.
    """
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("NO_PROXY", NO_PROXY)
        patch.setenv("no_proxy", NO_PROXY)

        def start(storage: Storage = "basic", folder: Path | None = None) -> LoopbackHub:
            patch.setattr(constants, "HF_HUB_DISABLE_XET", storage != "xet")
            return stack.enter_context(LoopbackHub(folder or tmp_path_factory.mktemp("hub"), storage))

        yield start
