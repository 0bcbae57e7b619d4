"""A model repository at one commit: what it holds, its files, and parts of them by range requests."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from pissa_hub.checkpoint.files import Pin
from pissa_hub.checkpoint.header import LENGTH_BYTES, Header, header_bytes, parse_header
from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.errors import HubError
from pissa_hub.hub.faults import hub_faults
from pissa_hub.hub.transport import hide_signatures, persistently

# The headers of most shards fit: one request for each.
_FIRST_BYTES = 16 << 10
_AT_ONCE = 4
_UNSAFE = re.compile(r"[\\:]")


@dataclass(frozen=True)
class RemoteFile:
    """Bytes of a file, and its SHA-256 in hex where the Hub stores it as a large one."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at a commit, which no later push changes.

    Attributes:
        pin: its id, what was asked for, and the commit.
        files: by relative POSIX name.
    """

    pin: Pin
    files: Mapping[str, RemoteFile] = field(repr=False)

    @property
    def snapshot(self) -> Path:
        """The folder in the client's cache that its files are fetched into."""
        folder = repo_folder_name(repo_id=self.pin.repo_id, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder, "snapshots", self.pin.commit)

    def cached(self, name: str) -> Path | None:
        """A file, if it is in the cache."""
        found = try_to_load_from_cache(self.pin.repo_id, name, revision=self.pin.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(
        self,
        name: str,
        folder: Path | None = None,
        bar: type[Any] | None = None,
        wait: Callable[[float], object] = time.sleep,
    ) -> Path:
        """A file on this disk.

        Args:
            name: of the file.
            folder: put it there instead of into the cache.
            bar: a tqdm class that is told of the bytes.
            wait: between attempts, see ``faults.persistently``.

        Raises:
            HubError: it cannot be fetched.
            OutputError: it cannot be written.
        """
        cached = self.cached(name) if folder is None else None
        if cached is not None:
            return cached
        call = partial(
            hf_hub_download,
            self.pin.repo_id,
            name,
            revision=self.pin.commit,
            local_dir=folder,
            tqdm_class=bar or silent_bar(),
        )
        with hub_faults(self.pin.repo_id, self.pin.asked, name):
            return Path(persistently(call, wait))

    def headers(self, names: Sequence[str]) -> list[Header]:
        """Headers of safetensors files; nothing else of them is transferred.

        Raises:
            HubError: one cannot be fetched.
            HeaderError: one is malformed.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._header, names))

    def _header(self, name: str) -> Header:
        path, size = PurePosixPath(self.pin.repo_id, name), self.files[name].size
        raw = self._range(name, 0, min(size, _FIRST_BYTES))
        needed = header_bytes(path, raw[:LENGTH_BYTES], size)
        if needed > len(raw):
            raw += self._range(name, len(raw), needed)
        return parse_header(path, raw[:needed], size)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a file."""
        url = hf_hub_url(self.pin.repo_id, name, revision=self.pin.commit)
        with hub_faults(self.pin.repo_id, self.pin.asked, name):
            data = persistently(lambda: _get(url, start, stop))
        if len(data) != stop - start:
            raise HubError(f"{self.pin.repo_id}/{name} does not come in parts", "download it and give its folder")
        return data


def open_repository(repo_id: str, asked: str | None = None, commit: str | None = None) -> Repository:
    """Look a repository up.

    Args:
        repo_id: ``org/name``.
        asked: branch, tag or commit; None for ``main``.
        commit: what that stood for when it was looked up before.

    Raises:
        HubError: it cannot be reached or read, or names a file that leads elsewhere.
    """
    hide_signatures()
    api, revision = HfApi(), asked or constants.DEFAULT_REVISION
    with hub_faults(repo_id, revision):
        if commit is None:
            commit = persistently(lambda: api.model_info(repo_id, revision=revision)).sha
            assert commit is not None
        tree = persistently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
        found = [item for item in tree if isinstance(item, RepoFile)]
    for item in found:
        is_safe = item.path.isprintable() and not _UNSAFE.search(item.path)
        if not is_safe or PurePosixPath(item.path).is_absolute() or ".." in item.path.split("/"):
            raise HubError(f"{repo_id} names the file {shown(item.path)}", "do not use it: it may be hostile")
    files = {item.path: RemoteFile(item.size, item.lfs.sha256 if item.lfs else None) for item in found}
    return Repository(Pin(repo_id, revision, commit), files)


def silent_bar() -> type[Any]:
    """A tqdm class that shows nothing; ours is the only bar."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[misc, type-arg, unused-ignore]  # with and without types-tqdm
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _get(url: str, start: int, stop: int) -> bytes:
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        data = bytearray()
        if response.status_code != 206 and start:
            return b""
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= stop - start:
                break
        return bytes(data[: stop - start])
