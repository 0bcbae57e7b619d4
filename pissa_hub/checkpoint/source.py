"""A folder or repository of safetensors files -> an immutable :class:`Checkpoint`, from headers alone."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pissa_hub.checkpoint.ancillary import PICKLE_SUFFIXES, declared_license, read_readme
from pissa_hub.checkpoint.files import Files, Folder
from pissa_hub.checkpoint.header import Header, TensorEntry
from pissa_hub.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, check_index, parse_index
from pissa_hub.checkpoint.opening import read_bounded
from pissa_hub.checkpoint.reader import reading
from pissa_hub.checkpoint.strict_json import parse_lenient_object, shown
from pissa_hub.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
_ADAPTER_NAME = "adapter_model.safetensors"
# DeepSeek's take 100 kB; labels of every image class in several languages, 1 MB.
MAX_CONFIG_BYTES = 16 << 20
MAX_CONFIG_VALUES = 500_000
# In all shards. The largest published models have 200,000.
MAX_TENSORS = 500_000
# Headers that are read before their tensors are counted.
_HEADERS_AT_ONCE = 16
_NUMBERED = re.compile(r".*-\d+-of-0*([1-9]\d*)\.safetensors")
# Repository and revision.
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\S+))?")
_DECOMPOSED = ("pissa_manifest.json", "pissa_init", ".pissa")
_FETCH_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its bare name, where it lies once it is on this disk, and its header."""

    name: str
    path: Path
    header: Header


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies in a folder or on the Hub.

    Attributes:
        files: what it consists of.
        shards: in name order.
        index: the parsed ``model.safetensors.index.json``, None for a single file; ``index_bytes`` as stored.
        config: the parsed ``config.json``, or None.
        other_files: relative POSIX names of the files to carry over.
        readme: the first MiB of README.md, or None.
        repo_id: ``org/name`` where it is on the Hub or a snapshot in its cache; ``revision`` its commit.
        license: as the README's front matter declares it, or None.
    """

    files: Files = field(repr=False)
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    index_bytes: bytes | None = field(repr=False)
    config: Mapping[str, Any] | None = field(repr=False)
    other_files: tuple[str, ...]
    readme: str | None = field(repr=False)
    repo_id: str | None
    revision: str | None
    license: str | None

    @property
    def place(self) -> PurePath:
        """The folder or the repository's id, for messages."""
        return self.files.place

    @property
    def root(self) -> Path:
        """The folder; of a repository the one that holds what was fetched so far."""
        return self.files.folder

    def tensors(self) -> Iterator[tuple[Shard, TensorEntry]]:
        """Every tensor, shard by shard in name order, within a shard in file order."""
        for shard in self.shards:
            for entry in shard.header.entries:
                yield shard, entry


def open_checkpoint(source: str | Path) -> Checkpoint:
    """:func:`read_checkpoint`, of an original: what is decomposed already is refused.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or the folder holds a decomposition.
    """
    path = Path(source)
    if path.exists():
        require_original(Folder(_folder_of(path)))
    return read_checkpoint(source)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read the headers and configuration of a checkpoint, an original or a residual base.

    Args:
        source: a folder, or a ``.safetensors`` file that is a whole checkpoint by itself.

    Raises:
        CheckpointError: one line that names the file or tensor and the remedy; HeaderError for a bad shard.
    """
    path = Path(source)
    if not path.exists():
        raise _absent(str(source))
    root = _folder_of(path)
    with reading(root):
        return read_files(Folder(root), None if path == root else path.name)


def read_files(files: Files, name: str | None = None) -> Checkpoint:
    """:func:`read_checkpoint`, wherever the files are.

    Args:
        files: the checkpoint's.
        name: the file that is the whole checkpoint, where one was given.
    """
    _refuse_adapter(files)
    index_bytes = _bounded_bytes(files, INDEX_NAME, MAX_INDEX_BYTES)
    index = None if index_bytes is None else parse_index(files.place / INDEX_NAME, index_bytes)
    if index is None:
        names = [_single_file(files) if name is None else _given_file(files.place / name)]
    else:
        names = _indexed_files(files, name, index["weight_map"])
    shards = tuple(
        Shard(name, files.folder / name, header) for name, header in zip(names, _headers(files, names), strict=True)
    )
    _check_unique(files.place, shards)
    if index is not None:
        check_index(files.place / INDEX_NAME, index, {shard.name: shard.header for shard in shards})
    files.find("README.md")
    readme = read_readme(files.folder)
    repo_id, revision = files.origin
    return Checkpoint(
        files=files,
        shards=shards,
        index=index,
        index_bytes=index_bytes,
        config=_read_config(files),
        other_files=files.other_files(),
        readme=readme,
        repo_id=repo_id,
        revision=revision,
        license=declared_license(readme),
    )


def require_original(files: Files) -> None:
    """Raises CheckpointError if a checkpoint is a decomposition, finished or not."""
    for name in _DECOMPOSED:
        if files.has(name):
            fact = f"{files.place} is already decomposed: it holds {name}"
            raise CheckpointError(fact, "give the original checkpoint")


def _absent(source: str) -> CheckpointError:
    hub_id = HUB_ID.fullmatch(source)
    if hub_id is None:
        return CheckpointError(f"{source} does not exist", "give a folder with a safetensors checkpoint")
    return CheckpointError(
        f"{source} is no folder here", f"run `hf download {hub_id[1]} --local-dir FOLDER` first and give FOLDER"
    )


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _refuse_adapter(files: Files) -> None:
    if files.has("adapter_config.json") and not files.has("config.json"):
        raise CheckpointError(f"{files.place} holds a PEFT adapter, not a model", "give its base model instead")


def _single_file(files: Files) -> str:
    """The one safetensors file of a place without an index."""
    root, names = files.place, files.names()
    candidates = [name for name in names if name.endswith(".safetensors") and name != _ADAPTER_NAME]
    if SINGLE_NAME in candidates:
        return SINGLE_NAME
    if len(candidates) == 1:
        return _given_file(root / candidates[0])
    if candidates:
        fact = f"{root} holds {len(candidates)} safetensors files but no {INDEX_NAME}"
        raise CheckpointError(fact, "download the index too, or give the one file that is the model")
    pickled = next((name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES), None)
    if pickled is not None:
        raise _pickled(root / pickled)
    raise CheckpointError(f"{root} holds no safetensors file", "give the folder that holds model.safetensors")


def _given_file(path: PurePath) -> str:
    """The name of a file that is to be the whole checkpoint."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickled(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file", "give a checkpoint's folder or .safetensors file")
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered and int(numbered[1]) > 1:
        fact = f"{path} is one of {numbered[1]} shards, and there is no {INDEX_NAME} beside it"
        raise CheckpointError(fact, "download the whole checkpoint")
    return path.name


def _pickled(path: PurePath) -> CheckpointError:
    fact = f"{path} is a pickle, which can run code when loaded, and there is no safetensors file beside it"
    return CheckpointError(fact, "convert it: load the model with transformers and save_pretrained it to a new folder")


def _indexed_files(files: Files, given: str | None, weight_map: Mapping[str, str]) -> list[str]:
    root, names = files.place, sorted(set(weight_map.values()))
    if given is not None and names != [given]:
        raise CheckpointError(
            f"{root / given} is not a checkpoint by itself: {INDEX_NAME} lies beside it", f"give {root}"
        )
    if names != [SINGLE_NAME] and files.has(SINGLE_NAME):
        # transformers would load the single file, whatever the index says.
        raise CheckpointError(f"{root} holds both {SINGLE_NAME} and {INDEX_NAME}", "remove the one that is not meant")
    for name in names:
        if not files.has(name):
            fact = f"{root / name} is missing, though {INDEX_NAME} names it"
            raise CheckpointError(fact, "download the whole checkpoint")
    return names


def _headers(files: Files, names: Sequence[str]) -> list[Header]:
    headers: list[Header] = []
    for start in range(0, len(names), _HEADERS_AT_ONCE):
        headers += files.headers(names[start : start + _HEADERS_AT_ONCE])
        if sum(len(header.entries) for header in headers) > MAX_TENSORS:
            raise CheckpointError(f"{files.place} holds more than {MAX_TENSORS} tensors", "check what it is")
    return headers


def _check_unique(place: PurePath, shards: Iterable[Shard]) -> None:
    holder: dict[str, Shard] = {}
    for shard in shards:
        for entry in shard.header.entries:
            first = holder.setdefault(entry.name, shard)
            if first is not shard:
                fact = f"tensor {shown(entry.name)} is in both {place / first.name} and {shard.name}"
                raise CheckpointError(fact, _FETCH_AGAIN)


def _read_config(files: Files) -> dict[str, Any] | None:
    path = files.place / "config.json"
    data = _bounded_bytes(files, path.name, MAX_CONFIG_BYTES)
    if data is None:
        return None
    try:
        return parse_lenient_object(data, MAX_CONFIG_VALUES)  # published ones hold Infinity
    except ValueError as error:
        raise CheckpointError(f"{path} {error}", _FETCH_AGAIN) from None


def _bounded_bytes(files: Files, name: str, limit: int) -> bytes | None:
    """The bytes of a small file, or None if there is none."""
    path = files.place / name
    if not files.has(name):
        if (files.folder / name).is_symlink():
            raise CheckpointError(f"{path} is a link that leads nowhere", _FETCH_AGAIN)
        return None
    if files.size(name) > limit:
        raise CheckpointError(f"{path} is larger than {limit} bytes", _FETCH_AGAIN)
    try:
        return read_bounded(files.path(name), limit)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", _FETCH_AGAIN) from None
    except ValueError as error:
        raise CheckpointError(f"{path} {error}", _FETCH_AGAIN) from None
