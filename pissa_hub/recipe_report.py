"""Recipes as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from pissa_hub.licenses import duties
from pissa_hub.recipes import MISSING, Recipe
from pissa_hub.report import size, table


def recipes_text(recipes: Sequence[Recipe]) -> str:
    """A line per recipe; a star marks those that need what their repository or this version lacks."""
    rows = []
    for recipe in recipes:
        star, lock = "*" if recipe.needs else "", " (gated)" if recipe.gated else ""
        rows.append(
            [
                recipe.name + star,
                recipe.model,
                (recipe.license_name or recipe.license) + lock,
                ", ".join(map(str, recipe.ranks)),
                str(recipe.expected.weights),
                size(recipe.expected.size),
                size(recipe.adapter_size(recipe.ranks[0])),
            ]
        )
    header = ["recipe", "model", "license", "ranks", "weights", "residual", "adapter, first rank"]
    lines = [
        table(header, rows),
        "",
        "`pissa-hub recipes NAME` explains one, `pissa-hub decompose --recipe NAME` runs it.",
    ]
    if any(recipe.needs for recipe in recipes):
        lines.append("* cannot be decomposed from its repository yet; the explanation says why.")
    return "\n".join(lines)


def recipe_text(recipe: Recipe) -> str:
    """What one recipe does: source, settings, sizes, commands and the license's duties."""
    named = f"{recipe.license_name} ({recipe.license_link})" if recipe.license_name else recipe.license
    gate = "; gated: accept its terms on the Hub and log in" if recipe.gated else ""
    also = "".join(f"; made from a model under {license_id}, whose duties hold too" for license_id in recipe.inherits)
    settings = [f"targets {recipe.targets}"]
    settings += [f"without {recipe.exclude}"] if recipe.exclude else []
    settings += [f"ranks {', '.join(map(str, recipe.ranks))} (the first by default)"]
    settings += [f"{key} at rank {rank}" for key, rank in recipe.rank_pattern.items()]
    settings += [f"alpha {'each rank' if recipe.alpha is None else recipe.alpha}"]
    adapters = ", ".join(f"{size(recipe.adapter_size(rank))} at rank {rank}" for rank in recipe.ranks)
    lines = [
        f"{recipe.name}: {recipe.model}",
        "",
        f"license   {named}{also}{gate}",
        f"settings  {'; '.join(settings)}",
        f"weights   {recipe.expected.weights:,} to decompose",
        f"output    residual {size(recipe.expected.size)}; adapter {adapters}",
        *([f"needs     {MISSING[recipe.needs]}"] if recipe.needs else []),
        *(f"note      {note}" for note in recipe.notes),
        "",
        *_commands(recipe),
    ]
    asked = _duties(recipe)
    lines += ["", "Before you publish, read the license" + (". It asks you to" if asked else ".")]
    return "\n".join([*lines, *(f"  - {clause}" for clause in asked)])


def recipes_json(recipes: Iterable[Recipe]) -> dict[str, Any]:
    return {"recipes": [recipe_json(recipe) for recipe in recipes]}


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields, and what follows from them."""
    return {
        **asdict(recipe),
        "repositories": {str(rank): recipe.repository_name(rank) for rank in recipe.ranks},
        "adapter_sizes": {str(rank): recipe.adapter_size(rank) for rank in recipe.ranks},
        "duties": _duties(recipe),
    }


def _commands(recipe: Recipe) -> list[str]:
    folder = recipe.repository_name(recipe.ranks[0])
    source = " FOLDER" if recipe.needs else ""
    return [
        f"  pissa-hub decompose --recipe {recipe.name}{source} -o {folder}",
        f"  pissa-hub verify {folder} --source {'FOLDER' if recipe.needs else recipe.model}",
        f"  pissa-hub publish {folder} YOUR_NAME/{folder}",
    ]


def _duties(recipe: Recipe) -> list[str]:
    inherited = (duty for license_id in recipe.inherits for duty in duties(license_id))
    return [*dict.fromkeys([*duties(recipe.license, recipe.license_name), *inherited])]
