"""The output folder of a job: whether it may be used, whether it is whole, and how it is left clean."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import OutputError
from pissa_hub.pipeline.receipts import WorkFolder


def free_space(output: Path) -> int:
    """Free bytes on the disk that a folder is on or would be created on."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_whole(output: Path, files: Mapping[str, FileDigest]) -> None:
    """Raises OutputError if a file of a finished folder is gone or has other bytes."""
    for name, digest in files.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != digest.size or FileDigest(*sha256_file(path)) != digest:
            raise OutputError(
                f"{output} was finished, but {name} is damaged or gone", "remove the folder and start again"
            )


def check_outside(output: Path, inputs: Mapping[str, Path]) -> None:
    """Raises OutputError if the output lies in one of the ``inputs``, what it is -> folder."""
    for what, path in inputs.items():
        folder = path.resolve()
        if output.resolve() == folder or folder in output.resolve().parents:
            raise OutputError(f"{output} lies in the {what}", "choose a folder outside of it")


def check_free(output: Path, work: WorkFolder, digest: str) -> None:
    """Raises OutputError unless the folder is absent, empty or holds unfinished work of this very job."""
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is not a folder", "choose another one")
    is_bare = not any(map(work.is_foreign, output.iterdir()))
    if work.exists and (work.is_of_a_run or is_bare):
        if work.found_digest() not in (None, digest):
            raise OutputError(
                f"{output} holds the unfinished work of another plan",
                "run that one's command again, choose another folder or remove it",
            )
    elif not is_bare:
        raise OutputError(f"{output} is not empty", "choose another folder")


def check_space(output: Path, needed: int) -> None:
    """Raises OutputError if fewer bytes than ``needed`` are free."""
    free = free_space(output)
    if needed > free:
        raise OutputError(
            f"{output} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            "free some space or choose another disk",
        )


def remove_partials(output: Path) -> None:
    """What a killed run was writing when it stopped."""
    for path in output.rglob("*.partial"):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def remove_output(output: Path, work: WorkFolder, names: Collection[str], absent: Sequence[Path]) -> None:
    """Leave nothing of a run whose input turned out to be bad, nor the folders that were ``absent``, deepest first."""
    for name in names:
        (output / name).unlink(missing_ok=True)
    work.remove()
    made = {output / folder for name in names for folder in PurePosixPath(name).parents} - {output}
    for folder in [*sorted(made, reverse=True), *absent]:
        with suppress(OSError):  # somebody else's files in it
            folder.rmdir()
