"""Model cards as the Hub reads them: the YAML between the first two lines of three dashes."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .wire import Answer, Call

RELATIONS = ("adapter", "finetune", "merge", "quantized")


def metadata(text: str) -> dict[str, Any]:
    """A README's front matter, empty without one.

    Raises:
        ValueError: it is no YAML mapping.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    try:
        read = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter is no YAML: {error}") from None
    if not isinstance(read, dict):
        raise ValueError("the front matter is no mapping")
    return read


def validate(call: Call) -> Answer:
    """POST /api/validate-yaml."""
    errors, warnings = [], []
    try:
        card = metadata(call.json()["content"])
    except ValueError as error:
        return Answer.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
    if not card:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    if card.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append({"message": f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'})
    for key in ("license", "library_name", "pipeline_tag"):
        if not isinstance(card.get(key, ""), str):
            errors.append({"message": f'"{key}" must be a string'})
    if not isinstance(card.get("tags", []), list):
        errors.append({"message": '"tags" must be an array'})
    return Answer.of({"errors": errors, "warnings": warnings}, 400 if errors else 200)
