"""The state that a PiSSA adapter started from: ours with its manifest, or one that a trainer saved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pissa_hub.adapter.config import CONFIG_NAME
from pissa_hub.adapter.peft_files import ADAPTER_FILES, CONVERSION_NAME, WEIGHTS_NAME, Adapter, open_adapter
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import AdapterError, ManifestError
from pissa_hub.manifest import MANIFEST_NAME, Manifest, load_manifest

INIT_FOLDER = "pissa_init"
# Where trainers that run PEFT's own initialisation leave its result: LLaMA-Factory, ms-swift.
_FOREIGN_FOLDERS = (INIT_FOLDER, "initial_model")
# All that a command reads of an initial adapter, wherever it is found.
INITIAL_FILES = frozenset(
    {
        MANIFEST_NAME,
        "README.md",
        "config.json",
        *(f"{folder}{name}" for folder in ("", *(f"{name}/" for name in _FOREIGN_FOLDERS)) for name in ADAPTER_FILES),
    }
)
_HUB_ID = re.compile(r"(?=.{,96}$)[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Initial:
    """An adapter before training.

    Attributes:
        adapter: its factors A, B and scaling.
        digest: of its weights.
        manifest: of the decomposition that made it; None if PEFT made it in-process.
        root: the folder that holds the manifest, else the adapter's own.
    """

    adapter: Adapter
    digest: FileDigest
    manifest: Manifest | None = field(repr=False)
    root: Path

    @property
    def base_model(self) -> str | None:
        """Hub id of the original model, where it is known."""
        if self.manifest is not None:
            return self.manifest.source.repo_id
        return hub_id(self.adapter.config.table.get("base_model_name_or_path"))


def open_initial(path: str | Path) -> Initial:
    """Find the initial adapter in a folder.

    Args:
        path: what ``decompose`` wrote, or its ``pissa_init`` folder, or a folder where PEFT saved the initial adapter,
            or an output folder of LLaMA-Factory or ms-swift, which hold such a one.

    Raises:
        AdapterError: there is none, or it is not the one that the manifest beside it names.
        ManifestError: the manifest cannot be read.
    """
    folder = Path(path)
    if not folder.exists():
        raise _absent(str(path))
    root = _decomposed_root(folder)
    if root is not None:
        return _ours(root, load_manifest(root))
    for name in _FOREIGN_FOLDERS:
        if (folder / name / CONFIG_NAME).is_file():
            return _foreign(folder / name)
    return _foreign(folder)


def open_decomposed(path: str | Path) -> tuple[Initial, Manifest]:
    """:func:`open_initial`, of a decomposition only. Raises ManifestError if there is no manifest."""
    folder = Path(path)
    if not folder.exists():
        raise _absent(str(path))
    root = _decomposed_root(folder)
    if root is None:
        raise ManifestError(
            f"{path} has no {MANIFEST_NAME}", "give a folder that decompose wrote, or its manifest and pissa_init"
        )
    manifest = load_manifest(root)
    return _ours(root, manifest), manifest


def hub_id(name: object) -> str | None:
    """The name, if it can only be a Hub id: never a local path."""
    return name if isinstance(name, str) and is_hub_id(name) and not Path(name).exists() else None


def is_hub_id(name: str) -> bool:
    """Whether a name is ``org/name`` as the Hub takes it."""
    return _HUB_ID.fullmatch(name) is not None


def looks_initial(folder: Path) -> bool:
    """Whether a folder lies where decompose or a trainer leaves an initial state."""
    return _decomposed_root(folder) is not None or folder.resolve().name in _FOREIGN_FOLDERS


def require_init(adapter: Path, init: Path | None) -> Path:
    """``init``, if it was given. Raises AdapterError that says where it may lie, if not, or that of a bad adapter."""
    if init is not None:
        return init
    if adapter.exists() or not is_hub_id(adapter.as_posix().partition("@")[0]):
        open_adapter(adapter)
    if (adapter / CONVERSION_NAME).exists():
        raise AdapterError(f"{adapter} is converted already", "load it on the original base as it is")
    places = [folder / name for folder in (adapter, adapter.parent) for name in _FOREIGN_FOLDERS]
    found = next((place for place in places if (place / CONFIG_NAME).is_file()), None)
    remedy = (
        "give --init with the folder that decompose wrote, or with what the trainer saved before its first step: your "
        "own save_pretrained (PEFT), pissa_init/ (LLaMA-Factory; pissa_backup/ is the trained one), initial_model/ "
        "(ms-swift)"
    )
    raise AdapterError(
        f"what {adapter} started from is not given, and without it no LoRA follows from a PiSSA adapter",
        remedy if found is None else f"give --init {found}",
    )


def _decomposed_root(folder: Path) -> Path | None:
    """The folder that holds the manifest: this one, or that of a pissa_init which this is."""
    if (folder / MANIFEST_NAME).is_file():
        return folder
    folder = folder.resolve()
    return folder.parent if folder.name == INIT_FOLDER and (folder.parent / MANIFEST_NAME).is_file() else None


def _ours(root: Path, manifest: Manifest) -> Initial:
    adapter = open_adapter(root / INIT_FOLDER)
    digests = {name: FileDigest(*sha256_file(adapter.folder / name)) for name in (WEIGHTS_NAME, CONFIG_NAME)}
    for name, digest in digests.items():
        if manifest.files.get(f"{INIT_FOLDER}/{name}") != digest:
            raise AdapterError(
                f"{adapter.folder / name} is not the one that {root / MANIFEST_NAME} names",
                "give the initial adapter as decompose wrote it, not a trained one",
            )
    return Initial(adapter, digests[WEIGHTS_NAME], manifest, root)


def _foreign(folder: Path) -> Initial:
    adapter = open_adapter(folder)
    return Initial(adapter, FileDigest(*sha256_file(adapter.path)), None, folder)


def _absent(path: str) -> AdapterError:
    if is_hub_id(path.partition("@")[0]):
        return AdapterError(
            f"{path} is no folder here",
            f"run `hf download {path.partition('@')[0]} --local-dir FOLDER` first and give FOLDER",
        )
    return AdapterError(f"{path} does not exist", "give the folder of the initial adapter")
