"""Turn Hugging Face checkpoints into PiSSA-ready ones: streamed, certified, resumable, verified.

import pissa_hub

pissa_hub.decompose("path/to/model", "path/to/output", rank=16)
pissa_hub.verify("path/to/output", source="path/to/model")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["PissaHubError", "__version__", "decompose", "verify"]

if TYPE_CHECKING:
    from pissa_hub.errors import PissaHubError
    from pissa_hub.pipeline.decompose import decompose
    from pissa_hub.verification import verify


_HOMES = {
    "PissaHubError": "pissa_hub.errors",
    "decompose": "pissa_hub.pipeline.decompose",
    "verify": "pissa_hub.verification",
}


def __getattr__(name: str) -> Any:
    """Import a verb when it is asked for: torch alone takes a second to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
