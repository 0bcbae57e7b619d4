"""The metadata of model cards: what the source's card hands on, and YAML and Markdown that no name can break."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

Metadata = Mapping[str, str | list[str]]

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LISTS = ("license", "language")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
_MAX_FRONT_MATTER = 1 << 16
_MAX_TEXT = 1000
_MAX_ITEMS = 300
# YAML takes no key of more than 1024 characters.
_LICENSE_KEY = re.compile(r"license[A-Za-z0-9._/-]{,100}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{,100}")
_UNSAFE = re.compile(r"[^\w.*/@:+=, ()-]")
_HUB_ID = re.compile(r"(?=.{,96}$)[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types here
    """Without aliases: merged into each other, a few dozen of them fill the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def source_metadata(readme: str | None) -> Metadata:
    """Licence, language and task of a model card's YAML front matter, as far as they are plain text.

    Args:
        readme: the card of a model that another one is made from; None if it has none.
    """
    found = _FRONT_MATTER.match(readme or "")
    if found is None or len(found[1]) > _MAX_FRONT_MATTER:
        return {}
    try:
        table = yaml.load(found[1], _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return carried_metadata(table) if isinstance(table, dict) else {}


def carried_metadata(table: Mapping[Any, Any]) -> Metadata:
    """What of a card's metadata holds for a model that is made from its model."""
    names = sorted(key for key in table if isinstance(key, str) and _LICENSE_KEY.fullmatch(key))
    values = {key: _text(table.get(key)) for key in dict.fromkeys([*_CARRIED, *names])}
    metadata = {key: value for key, value in values.items() if value and (isinstance(value, str) or key in _LISTS)}
    licence = metadata.get("license", "")
    if not all(map(_PLAIN.fullmatch, [licence] if isinstance(licence, str) else licence)):
        metadata.pop("license", None)
    return metadata


def license_names(metadata: Metadata, declared: str | None = None) -> Iterator[str]:
    """Ids and the name of a card's licences.

    Args:
        metadata: of the card.
        declared: the licence, where the metadata does not say.
    """
    licence = metadata.get("license") or declared or []
    yield from [licence] if isinstance(licence, str) else licence
    name = metadata.get("license_name")
    if isinstance(name, str):
        yield name


def front_matter(
    *,
    library: str,
    tags: Sequence[str],
    relation: str,
    base: str | None,
    base_license: str | None,
    metadata: Metadata,
) -> str:
    """YAML metadata between its two lines of dashes.

    Every value is JSON, which YAML reads as it is: no value ends early or turns into a boolean, and the bytes do not
    depend on the version of a YAML writer.

    Args:
        library: that loads the model.
        tags: its own.
        relation: ``base_model_relation``, where the base is known.
        base: Hub id of the original model.
        base_license: its licence, where ``metadata`` does not say.
        metadata: what the original's card hands on.
    """
    table: dict[str, Any] = {"library_name": library, "tags": list(tags)}
    if is_hub_id(base):
        table |= {"base_model": base, "base_model_relation": relation}
    if base_license and _PLAIN.fullmatch(base_license):
        table["license"] = base_license
    table |= metadata
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    return "\n".join(["---", *lines, "---"])


def code(text: object) -> str:
    """A name of unknown origin as inline code, in a table too: what could end it becomes a question mark."""
    return f"`{_UNSAFE.sub('?', str(text))[:200] or '?'}`"


def prose(text: str) -> str:
    """A sentence of unknown origin: one line, without what Markdown or HTML would make of it."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*\[\]<>|#!])", r"\\\1", line)


def is_hub_id(name: object) -> bool:
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def origin(repo_id: str | None, revision: object) -> str:
    """The original model in a sentence, with its commit where that is known."""
    if not is_hub_id(repo_id):
        return "a local checkpoint"
    link = f"[{repo_id}](https://huggingface.co/{repo_id})"
    return f"{link} at commit `{revision}`" if isinstance(revision, str) and _COMMIT.fullmatch(revision) else link


def _text(value: object) -> str | list[str] | None:
    """Printable text or a list of such; None for all else."""
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= _MAX_TEXT else None
    if isinstance(value, list) and len(value) <= _MAX_ITEMS and all(isinstance(_text(item), str) for item in value):
        return list(value)
    return None
