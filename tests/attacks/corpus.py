"""All attacks."""

from __future__ import annotations

from . import adapters, configs, folders, headers, recipes, records
from .case import Attack

ATTACKS: tuple[Attack, ...] = tuple(
    attack for room in (headers, folders, configs, adapters, records, recipes) for attack in room.ATTACKS
)
