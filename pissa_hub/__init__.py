"""Turn Hugging Face checkpoints into PiSSA-ready ones: streamed, certified, resumable, verified.

import pissa_hub

pissa_hub.decompose("path/to/model", "path/to/output", rank=16)
pissa_hub.verify("path/to/output", source="path/to/model")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["PissaHubError", "__version__", "convert", "decompose", "load", "merge", "publish", "restore", "verify"]

if TYPE_CHECKING:
    from pissa_hub.adapter.convert import convert
    from pissa_hub.adapter.merge import merge
    from pissa_hub.adapter.restore import restore
    from pissa_hub.errors import PissaHubError
    from pissa_hub.hub.publish import publish
    from pissa_hub.loading import load
    from pissa_hub.pipeline.decompose import decompose
    from pissa_hub.verification import verify


_HOMES = {
    "PissaHubError": "pissa_hub.errors",
    "convert": "pissa_hub.adapter.convert",
    "decompose": "pissa_hub.pipeline.decompose",
    "load": "pissa_hub.loading",
    "restore": "pissa_hub.adapter.restore",
    "merge": "pissa_hub.adapter.merge",
    "publish": "pissa_hub.hub.publish",
    "verify": "pissa_hub.verification",
}


def __getattr__(name: str) -> Any:
    """Import a verb when it is asked for: torch alone takes a second to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
