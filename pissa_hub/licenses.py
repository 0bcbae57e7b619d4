"""What the licenses of popular base models ask of whoever publishes a model made from one.

A reminder to read the license by, not a replacement for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_COMMUNITY = re.compile(r"llama3\.[1-9]")
_MODIFIED = "say that the weights were modified (the model card that decompose writes does)"


def duties(license_id: str, name: str | None = None) -> tuple[str, ...]:
    """What a publisher has to do, a clause each; empty for a license that is not known here.

    Args:
        license_id: as the Hub spells it, e.g. ``apache-2.0``.
        name: the Hub's ``license_name``, where ``license_id`` is ``other``.
    """
    if _COMMUNITY.fullmatch(license_id):
        version = license_id.removeprefix("llama")
        return (
            "start the repository's name with 'Llama'",
            "show 'Built with Llama' prominently, for example in the model card",
            "include the license agreement and, in a file NOTICE: "
            f"'Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, "
            "Inc. All Rights Reserved.'",
            "pass on the Acceptable Use Policy (USE_POLICY.md)",
        )
    return _DUTIES.get(name or "" if license_id == "other" else license_id, ())


def name_prefix(license_ids: Iterable[str]) -> str:
    """What the name of a published model has to start with under these licenses; empty for anything."""
    ids = list(license_ids)
    if "llama3" in ids:
        return "Llama-3"
    return "Llama" if any(_COMMUNITY.fullmatch(license_id) for license_id in ids) else ""


_DUTIES = {
    "apache-2.0": ("keep LICENSE and NOTICE", _MODIFIED),
    "mit": ("keep the copyright notice and the license text",),
    "llama2": (
        "include the license agreement and, in a file NOTICE: 'Llama 2 is licensed under the LLAMA 2 Community "
        "License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.'",
        "pass on the Acceptable Use Policy (USE_POLICY.md)",
    ),
    "llama3": (
        "start the repository's name with 'Llama-3'",
        "show 'Built with Meta Llama 3' prominently, for example in the model card",
        "include the license agreement and, in a file NOTICE: 'Meta Llama 3 is licensed under the Meta Llama 3 "
        "Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.'",
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
