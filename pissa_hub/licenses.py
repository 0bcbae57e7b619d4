"""What the licenses of popular base models ask of whoever publishes a model made from one.

A reminder to read the license by, not a replacement for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LLAMA = re.compile(r"llama[-_ ]?(\d+)(\.\d+)?.*", re.IGNORECASE)
_RESTRICTED = ("llama", "gemma")
_MODIFIED = "say that the weights were modified (the model card that decompose writes does)"


@dataclass(frozen=True)
class Terms:
    """What a license asks of a model that is made from its own.

    Attributes:
        notice: what has to be displayed, such as "Built with Llama"; None for nothing.
        name_prefix: what the model's name has to begin with, if it is made available; None for nothing.
        is_restricted: whether its base is handed out only to those who accept it.
    """

    notice: str | None
    name_prefix: str | None
    is_restricted: bool


def terms_of(names: Iterable[str]) -> Terms:
    """The terms of all licenses that hold together, by their ids or names; of two prefixes the longer one."""
    names = list(names)
    known = [llama for llama in map(_llama, names) if llama]
    asked = max(known, key=lambda llama: len(llama.name_prefix), default=None)
    return Terms(
        notice=asked.notice if asked else None,
        name_prefix=asked.name_prefix if asked else None,
        is_restricted=any(name.lower().startswith(_RESTRICTED) for name in names),
    )


def has_prefix(name: str, prefix: str) -> bool:
    """Whether a repository's name begins as a license asks, whatever joins its words."""
    return re.sub(r"[-_. ]", "", name).lower().startswith(prefix.replace(" ", "").lower())


def duties(license_id: str, name: str | None = None) -> tuple[str, ...]:
    """What a publisher has to do, a clause each; empty for a license that is not known here.

    Args:
        license_id: as the Hub spells it, e.g. ``apache-2.0``.
        name: the Hub's ``license_name``, where ``license_id`` is ``other``.
    """
    license_name = name or "" if license_id == "other" else license_id
    llama = _llama(license_name)
    if llama is None:
        return _DUTIES.get(license_name, ())
    return (
        f"start the repository's name with '{llama.name_prefix.replace(' ', '-')}'",
        f"show '{llama.notice}' prominently, for example in the model card",
        f"include the license agreement and, in a file NOTICE: '{llama.product} is licensed under the {llama.product} "
        "Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.'",
        "pass on the Acceptable Use Policy (USE_POLICY.md)",
    )


@dataclass(frozen=True)
class _Llama:
    """The community license of a Llama from 3 on."""

    product: str
    notice: str
    name_prefix: str


def _llama(license_name: str) -> _Llama | None:
    version = _LLAMA.fullmatch(license_name)
    if version is None or int(version[1]) < 3:
        return None
    if version[1] == "3" and version[2] is None:
        return _Llama("Meta Llama 3", "Built with Meta Llama 3", "Llama 3")
    return _Llama(f"Llama {version[1]}{version[2] or ''}", "Built with Llama", "Llama")


_DUTIES = {
    "apache-2.0": ("keep LICENSE and NOTICE", _MODIFIED),
    "mit": ("keep the copyright notice and the license text",),
    "llama2": (
        "include the license agreement and, in a file NOTICE: 'Llama 2 is licensed under the LLAMA 2 Community "
        "License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.'",
        "pass on the Acceptable Use Policy (USE_POLICY.md)",
    ),
    "gemma": (
        "pass on the Gemma Terms of Use and the Gemma Prohibited Use Policy as conditions",
        _MODIFIED,
        "include in a file NOTICE: 'Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms'",
    ),
    "qwen": (
        "include the Qwen License Agreement and its NOTICE text",
        _MODIFIED,
        "show 'Built with Qwen' or 'Improved using Qwen' with a model that is trained from it",
    ),
    "qwen-research": (
        "keep to non-commercial use, and say so to whoever downloads it",
        "include the Qwen Research License Agreement and its NOTICE text",
        _MODIFIED,
        "show 'Built with Qwen' or 'Improved using Qwen' with a model that is trained from it",
    ),
    "deepseek": (
        "include the DeepSeek License Agreement and pass on its use restrictions as conditions",
        _MODIFIED,
    ),
}
