"""A model repository as publishing needs it: what is on a branch, uploads that nobody sees, one commit that all see."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from pissa_hub import __version__
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import HubError, PissaHubError, VerificationError
from pissa_hub.finished import RECORD_NAMES
from pissa_hub.hub.card_data import Metadata, carried_metadata
from pissa_hub.hub.publish_errors import LOG_IN, upload_faults
from pissa_hub.hub.publish_release import Base, Content
from pissa_hub.progress import Progress

DEFAULT_BRANCH = "main"
# Smaller files are read once and uploaded together; the Hub takes a larger one as a large file always.
_SMALL = 10_000_000
_TOGETHER = 64_000_000


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: size in bytes, git's SHA-1 and, of a large one, its SHA-256, in hex."""

    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True)
class Head:
    """A branch when it was looked at.

    Attributes:
        commit: its newest.
        is_private: whether the repository is.
        files: by path.
    """

    commit: str
    is_private: bool
    files: Mapping[str, RemoteFile] = field(repr=False)


@dataclass(frozen=True)
class BaseStatus:
    """What the Hub says of the original model: whether all may have it, and what its card hands on."""

    is_gated: bool
    is_private: bool
    metadata: Metadata


class Remote:
    """A repository, or the place of one to be.

    Args:
        repo_id: its name; of the token's user where it has no namespace.
        branch: that will change.
        create_pr: whether to open a pull request there instead.

    Raises:
        HubError: there is no token, it is not accepted or may only read, or the Hub cannot be reached.
    """

    def __init__(self, repo_id: str, branch: str = DEFAULT_BRANCH, *, create_pr: bool = False) -> None:
        self._api = HfApi(library_name="pissa_hub", library_version=__version__)
        self.branch, self.create_pr = branch, create_pr
        self.repo_id = repo_id
        with upload_faults(repo_id):
            if get_token() is None:
                raise HubError("there is no Hub token", LOG_IN)
            user = self._api.whoami()
            if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
                raise HubError("the Hub token may only read", LOG_IN)
            self.repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/{self.repo_id}"

    def head(self, branch: str | None = None) -> Head | None:
        """A branch as it is now; None if there is no such repository or branch."""
        with upload_faults(self.repo_id):
            try:
                info = self._api.model_info(self.repo_id, revision=branch or self.branch)
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                if error.response.status_code == 401:
                    raise
                return None
            tree = self._api.list_repo_tree(self.repo_id, recursive=True, revision=info.sha)
            files = {
                entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in tree
                if hasattr(entry, "blob_id")
            }
            return Head(info.sha, bool(info.private), files)

    def exists(self) -> bool:
        with upload_faults(self.repo_id):
            return bool(self._api.repo_exists(self.repo_id))

    def create(self, private: bool | None) -> None:
        """Make the repository; public, private, or as the account's default is."""
        with upload_faults(self.repo_id):
            self._api.create_repo(self.repo_id, private=private)

    def create_branch(self, branch: str, at: str | None = None) -> None:
        """Make a branch at a commit, or at the default branch's head."""
        with upload_faults(self.repo_id):
            self._api.create_branch(self.repo_id, branch=branch, revision=at, exist_ok=True)

    def delete_branch(self, branch: str) -> None:
        with upload_faults(self.repo_id):
            self._api.delete_branch(self.repo_id, branch=branch)

    def base_status(self, base: Base) -> BaseStatus | None:
        """Of the original model; None where it is not on the Hub or not to be seen."""
        if base.repo_id is None:
            return None
        try:
            with upload_faults(base.repo_id):
                try:
                    info = self._api.model_info(base.repo_id, revision=base.revision)
                except GatedRepoError:
                    return BaseStatus(True, False, {})
                card = info.card_data.to_dict() if info.card_data else {}
                return BaseStatus(bool(info.gated), bool(info.private), carried_metadata(card))
        except PissaHubError:
            return None

    def published_names(self, head: Head) -> frozenset[str] | None:
        """What an earlier release put there, by its record; None if there is no record of one."""
        name = next((name for name in RECORD_NAMES if name in head.files), None)
        if name is None:
            return None
        with upload_faults(self.repo_id), _bars_on_terminals_only(), tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.repo_id, name, revision=head.commit, local_dir=folder)
            files = parse_object(Path(path).read_bytes()).get("files")
        return frozenset({name, *(files if isinstance(files, dict) else ())}) & head.files.keys()

    def upload(
        self, contents: Mapping[str, Content], progress: Progress, branch: str | None = None
    ) -> list[CommitOperationAdd]:
        """Send large files to the Hub's store, where nobody sees them until a commit names them.

        Small files together, large ones one after another; what the store has already is not sent again.

        Raises:
            VerificationError: a file changed since its digest was taken.
        """
        done = []
        for group in _groups(contents):
            additions = [_addition(name, content) for name, content in group.items()]
            progress.working_on(next(iter(group)))
            with upload_faults(self.repo_id), _bars_on_terminals_only():
                self._api.preupload_lfs_files(
                    self.repo_id, additions, revision=branch or self.branch, create_pr=self.create_pr and branch is None
                )
            for addition in additions:
                name = addition.path_in_repo
                if addition.upload_info.sha256.hex() != group[name].digest.sha256:
                    raise _changed(name)
                progress.advance(group[name].digest.size)
            done += additions
        return done

    def commit(self, operations: Sequence[Any], message: str, parent: str | None, branch: str | None = None) -> Any:
        """Change the branch in one step, or open a pull request, and return the client's CommitInfo.

        Args:
            operations: the client's.
            message: of the commit.
            parent: commit that the branch has to be at; None for any.
            branch: another one than the repository's.

        Raises:
            MovedError: it is at another.
        """
        with upload_faults(self.repo_id), _bars_on_terminals_only():
            return self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=branch or self.branch,
                parent_commit=parent,
                create_pr=self.create_pr and branch is None,
            )

    @staticmethod
    def deletions(names: Iterable[str]) -> list[CommitOperationDelete]:
        return [CommitOperationDelete(name, is_folder=False) for name in names]

    @staticmethod
    def copies(names: Iterable[str], revision: str) -> list[CommitOperationCopy]:
        """Files of another branch, which the Hub copies without moving their bytes."""
        return [CommitOperationCopy(name, name, src_revision=revision) for name in names]


def is_same(content: Content, remote: RemoteFile | None) -> bool:
    """Whether the Hub's file is this one."""
    if remote is None or remote.size != content.digest.size:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == content.digest.sha256
    if content.data is None or remote.size > _SMALL:
        return False
    data = content.data if isinstance(content.data, bytes) else content.data.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob


def digest_of(remote: RemoteFile) -> FileDigest | None:
    """Of a large file."""
    return None if remote.sha256 is None else FileDigest(remote.size, remote.sha256)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The client draws its bars into log files too."""
    if are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _groups(contents: Mapping[str, Content]) -> Iterator[dict[str, Content]]:
    group: dict[str, Content] = {}
    for name, content in contents.items():
        if content.digest.size > _SMALL:
            yield {name: content}
            continue
        if group and content.digest.size + sum(other.digest.size for other in group.values()) > _TOGETHER:
            yield group
            group = {}
        group[name] = content
    if group:
        yield group


def _addition(name: str, content: Content) -> CommitOperationAdd:
    data = content.data
    assert data is not None, f"{name} has no content"
    if isinstance(data, Path) and content.digest.size <= _SMALL:
        data = data.read_bytes()
        if hashlib.sha256(data).hexdigest() != content.digest.sha256:
            raise _changed(name)
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)


def _changed(name: str) -> VerificationError:
    return VerificationError(
        f"{name} changed while it was being published", "leave the folder alone, then run it again"
    )
