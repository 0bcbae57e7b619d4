"""The files of a checkpoint that are not its weights: what is carried over, the README, the licence."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath

from pissa_hub.checkpoint.opening import open_regular, read_bounded
from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.errors import CheckpointError

MODULES_NAME = "modules.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES: frozenset[str] = PICKLE_SUFFIXES | {
    ".safetensors",
    ".h5",
    ".hdf5",
    ".keras",
    ".msgpack",
    ".npz",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".tflite",
    ".mlmodel",
    ".pb",
    ".nemo",
    ".engine",
}

_INDEX = re.compile(r".*\.(safetensors|bin|h5|msgpack)\.index(\.[^/]*)?\.json", re.IGNORECASE)
_OTHER_FORMATS = frozenset({"original", "onnx", "openvino", "coreml", "runs", "__pycache__"})
# What pissa_hub writes beside a model is true of that folder only.
_INITIAL_ADAPTER = "pissa_init"
_RECORDS = frozenset({"pissa_manifest.json", "pissa_conversion.json", "pissa_merge.json"})
# transformers would load the adapter that adapter_config.json describes; its weights are not carried.
_NOT_CARRIED = _RECORDS | {"readme.md", "adapter_config.json"}
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]{1,100})[\"']?[ \t]*$", re.MULTILINE)
_MAX_README_BYTES = 1 << 20
MAX_MODULES_BYTES = 1 << 20
MAX_FILES = 10_000
MAX_DEPTH = 16


def other_files(root: Path) -> tuple[str, ...]:
    """Relative POSIX names of the regular files to carry over, sorted.

    Left out are weights in every format, their indexes, hidden files, exports to other formats, training
    leftovers, what ``decompose`` and its sister commands add, and the README, which is written anew. The
    safetensors of a sentence-transformers module (``2_Dense/``) are carried.

    Raises:
        CheckpointError: such a module has pickle weights only; without them the result would not load. Or a
            name is not UTF-8 or not printable, as no JSON file and no other system could name it; or a file may not
            be read, or is a link to one that does not belong to the checkpoint.
    """
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_skipped_folder(name)]
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [(relative / name).as_posix() for name in files if Path(folder, name).is_file()]
        if len(found) > MAX_FILES or (subfolders and len(relative.parts) == MAX_DEPTH):
            raise CheckpointError(
                f"{root} holds more than {MAX_FILES} files, or folders more than {MAX_DEPTH} deep",
                "give a folder with the checkpoint alone",
            )
    path = root / MODULES_NAME
    try:
        modules = read_bounded(path, MAX_MODULES_BYTES) if path.is_file() else None
    except (OSError, ValueError):
        modules = None
    return tuple(_checked(root, name) for name in carried_over(root, found, modules))


def carried_over(place: PurePath, names: Iterable[str], modules: bytes | None) -> tuple[str, ...]:
    """What of a checkpoint's files, by their relative POSIX names, is carried over; see :func:`other_files`.

    Args:
        place: where they lie, for messages.
        names: of all files.
        modules: the bytes of ``modules.json``, None where there is none.

    Raises:
        CheckpointError: a module has pickle weights only, or two names differ in case alone.
    """
    paths = [PurePosixPath(name) for name in names]
    folders = {folder for folder in _module_folders(modules) if not any(map(_is_skipped_folder, folder.parts))}
    for folder in sorted(folders):
        _refuse_pickled_module(place / folder, [path.name for path in paths if path.parent == folder])
    carried = sorted(path.as_posix() for path in paths if _is_carried(path, folders))
    known: dict[str, str] = {}
    for name in carried:
        other = known.setdefault(name.casefold(), name)
        if other != name:
            fact = f"{place} holds both {shown(other)} and {shown(name)}, which other systems do not tell apart"
            raise CheckpointError(fact, "remove one of them")
    return tuple(carried)


def read_readme(root: Path) -> str | None:
    """The first MiB of README.md, or None."""
    path = root / "README.md"
    if not path.is_file():
        return None
    with open_regular(path) as file:
        return file.read(_MAX_README_BYTES).decode(errors="replace")


def declared_license(readme: str | None) -> str | None:
    """The ``license:`` of a model card's YAML front matter where it is one plain word, else None."""
    front_matter = re.match(r"---\r?\n(.*?)^---", readme or "", re.DOTALL | re.MULTILINE)
    found = _LICENSE.search(front_matter[1].replace("\r", "")) if front_matter else None
    return found[1] if found else None


def _checked(root: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{root} holds a file whose name is not UTF-8, {shown(name)}", "rename it") from None
    if not name.isprintable():
        raise CheckpointError(f"{root} holds a file whose name is not printable, {shown(name)}", "rename it")
    if not _belongs(root, (root / name).resolve()):
        fact = f"{root / name} is a link out of the checkpoint, to a file that would be copied"
        raise CheckpointError(fact, "put the file itself in its place, or remove the link")
    if not os.access(root / name, os.R_OK):
        raise CheckpointError(f"{root / name} cannot be read: Permission denied", "check its permissions")
    return name


def _belongs(root: Path, target: Path) -> bool:
    """Whether a file is in the checkpoint's folder or in the Hub's cache, where snapshots link to ``blobs``."""
    blobs = target.parent
    return target.is_relative_to(root.resolve()) or (blobs.name == "blobs" and blobs.parent.name.startswith("models--"))


def _is_carried(path: PurePosixPath, modules: set[PurePosixPath]) -> bool:
    weights = WEIGHT_SUFFIXES - {".safetensors"} if path.parent in modules else WEIGHT_SUFFIXES
    return not (
        any(_is_skipped_folder(folder) for folder in path.parent.parts)
        or _suffix(path.name) in weights
        or _INDEX.fullmatch(path.name)
        or (len(path.parts) == 1 and path.name.casefold() in _NOT_CARRIED)
        or path.name.startswith(".")
    )


def _module_folders(data: bytes | None) -> set[PurePosixPath]:
    """The subfolders that a sentence-transformers ``modules.json`` names; empty if there are none."""
    if data is None:
        return set()
    try:
        modules = json.loads(data)
    except (ValueError, RecursionError):
        return set()
    if not isinstance(modules, list):
        return set()
    paths = (module.get("path") for module in modules if isinstance(module, dict))
    return {PurePosixPath(path) for path in paths if isinstance(path, str)} - {PurePosixPath()}


def _is_skipped_folder(name: str) -> bool:
    return name.startswith((".", "checkpoint-")) or name.casefold() == _INITIAL_ADAPTER or name in _OTHER_FORMATS


def _refuse_pickled_module(folder: PurePath, files: list[str]) -> None:
    pickled = [name for name in files if _suffix(name) in PICKLE_SUFFIXES]
    if pickled and not any(_suffix(name) == ".safetensors" for name in files):
        fact = f"{folder / pickled[0]} holds a module's weights as pickle"
        raise CheckpointError(fact, "load the model with sentence-transformers and save it again")


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
