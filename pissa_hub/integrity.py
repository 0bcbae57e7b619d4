"""A finished folder against its record: every file is there as it was written, and no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pissa_hub.checkpoint.header import Header, read_header
from pissa_hub.checkpoint.index import INDEX_NAME, check_index, parse_index
from pissa_hub.checkpoint.opening import open_regular, read_bounded
from pissa_hub.checkpoint.reader import reading, sha256_file
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.comparison import Check
from pissa_hub.errors import CheckpointError
from pissa_hub.finished import Finished
from pissa_hub.progress import Progress


def check_files(finished: Finished, progress: Progress) -> Check:
    """Every file's size and hash, and that there is no other.

    A link to a file is as good as the file; the Hub's cache consists of such. Hidden files and folders at the top are
    the Hub's, Git's or the system's: nothing that loads a model reads them, and they are not looked at. Nor are empty
    folders.
    """
    files, problems = finished.record.files, []
    for name, digest in files.items():
        progress.working_on(name)
        problem = _difference(finished, name, digest)
        progress.advance(digest.size)
        if problem:
            problems.append(problem)
    known = {*files, finished.record_name}
    problems += [f"{name} is not in {finished.record_name}" for name in _contents(finished.folder) if name not in known]
    return Check("files and hashes", len(files), tuple(problems))


def check_headers(finished: Finished) -> tuple[dict[str, Header], Check]:
    """The header of every safetensors file by name, as far as it can be read, and whether the index fits them."""
    folder, files = finished.folder, finished.record.files
    headers: dict[str, Header] = {}
    problems = []
    for name in files:
        if name.endswith(".safetensors"):
            try:
                headers[name] = read_header(folder / name)
            except CheckpointError as error:
                problems.append(error.fact)
    problems += [f"there is no {name}" for name in finished.shards if name not in files]
    if INDEX_NAME in files and not problems:
        path = folder / INDEX_NAME
        try:
            index = parse_index(path, read_bounded(path, files[INDEX_NAME].size))
            check_index(path, index, {name: headers[name] for name in finished.shards})
        except CheckpointError as error:
            problems.append(error.fact)
        except KeyError as error:
            problems.append(f"{INDEX_NAME} names {error}, which is none of the shards")
        except (OSError, ValueError) as error:
            problems.append(f"{path} cannot be read ({error})")
    return headers, Check("headers and index", len(headers), tuple(problems))


def _difference(finished: Finished, name: str, digest: FileDigest) -> str | None:
    path = finished.folder / name
    try:
        with reading(path), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != digest.size:
            return f"{name} has {size} bytes instead of {digest.size}"
        if FileDigest(*sha256_file(path)) != digest:
            return f"{name} has other content than {finished.record_name} says"
    except CheckpointError as error:
        return error.fact
    return None


def _contents(folder: Path) -> Iterator[str]:
    """Whatever is no folder and lies under no hidden one; a link to a folder is no folder."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not relative.parts[0].startswith(".") and (path.is_symlink() or not path.is_dir()):
            yield relative.as_posix()
