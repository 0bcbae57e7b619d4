"""What the licences of well-known bases ask of the models that are made from them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pissa_hub.hub.card_data import Metadata, code

_LLAMA = re.compile(r"llama[-_ ]?(\d+)(?:\.(\d+))?.*", re.IGNORECASE)
_RESTRICTED = ("llama", "gemma")
_LINK = re.compile(r"https://[\w./:%+=&?~-]+", re.ASCII)


@dataclass(frozen=True)
class Terms:
    """What a licence asks of a model that is made from its own.

    Attributes:
        notice: what has to be displayed, such as "Built with Llama"; None for nothing.
        name_prefix: what the model's name has to begin with, if it is made available; None for nothing.
        is_restricted: whether its base is handed out only to those who accept it.
    """

    notice: str | None
    name_prefix: str | None
    is_restricted: bool


def terms_of(metadata: Metadata, declared: str | None = None) -> Terms:
    """The terms by the licence's name.

    Args:
        metadata: of the card, see ``card_data.source_metadata``.
        declared: the licence, where the metadata does not say.
    """
    names = list(_names(metadata, declared))
    restricted = any(name.lower().startswith(_RESTRICTED) for name in names)
    for name in names:
        version = _LLAMA.fullmatch(name)
        if version and int(version[1]) == 3 and version[2] is None:
            return Terms("Built with Meta Llama 3", "Llama 3", restricted)
        if version and int(version[1]) >= 3:
            return Terms("Built with Llama", "Llama", restricted)
    return Terms(None, None, restricted)


def has_prefix(name: str, prefix: str) -> bool:
    """Whether a repository's name begins as the licence asks, whatever joins its words."""
    return re.sub(r"[-_. ]", "", name).lower().startswith(prefix.replace(" ", "").lower())


def license_section(metadata: Metadata, declared: str | None, holds: str) -> str:
    """The card's section on the licence.

    Args:
        metadata, declared: as of :func:`terms_of`.
        holds: a sentence on what the licence holds for.
    """
    terms = terms_of(metadata, declared)
    names = ", ".join(code(name) for name in dict.fromkeys(_names(metadata, declared)))
    link = metadata.get("license_link")
    address = f" (<{link}>)" if isinstance(link, str) and _LINK.fullmatch(link) else ""
    known = f"The licence of the original is {names}{address}." if names else "The original names no licence."
    return "\n\n".join(["## Licence", *([f"**{terms.notice}**"] if terms.notice else []), f"{known} {holds}"])


def _names(metadata: Metadata, declared: str | None) -> Iterator[str]:
    licence = metadata.get("license") or declared or []
    yield from [licence] if isinstance(licence, str) else licence
    name = metadata.get("license_name")
    if isinstance(name, str):
        yield name
