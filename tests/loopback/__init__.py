"""A Hub on 127.0.0.1, for tests of code that pulls and publishes with the real huggingface_hub."""

from .errors import HubError
from .server import LoopbackHub

__all__ = ["HubError", "LoopbackHub"]
