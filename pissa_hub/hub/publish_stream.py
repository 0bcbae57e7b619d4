"""Publishing while decomposing: each finished shard goes to the Hub at once, and the release appears in one commit.

Shards wait on a branch of their own, named after the plan, so that an interrupted run finds there what it need not make
again, though the local files are gone. The last commit copies them, which moves no bytes, and the branch is deleted.
Whoever gives up an interrupted run deletes it by hand: ``hf repos branch delete REPO_ID pissa-upload-...``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread

from pissa_hub.checkpoint.writer import FileDigest, write_file_atomic
from pissa_hub.errors import CARRY_ON, HubError, OutputError, VerificationError
from pissa_hub.hub.card_data import Metadata
from pissa_hub.hub.publish import Published, commit_message
from pissa_hub.hub.publish_release import Base, Content, full_contents, open_release
from pissa_hub.hub.publish_remote import DEFAULT_BRANCH, Remote, digest_of
from pissa_hub.hub.publish_target import open_target
from pissa_hub.progress import Progress, Silent

_POLL_SECONDS = 0.1
# Hidden, for it is true of this folder only and no part of the release.
_PLACE_NAME = ".pissa_published.json"


class Publication:
    """A release of a decomposition that is still being made; see ``pipeline.destination.Destination``.

    Args:
        repo_id: ``owner/name``; created if there is none.
        digest: of the plan, in hex.
        base: the source.
        metadata: of the source's card, see ``card_data.source_metadata``.
        auto_class: transformers class that loads the result.
        private, revision, create_pr: as of ``publish``.
        progress: told how far the uploads are.

    Attributes:
        notes: sentences for the user.

    Raises:
        HubError: as of ``publish``.
    """

    def __init__(
        self,
        repo_id: str,
        digest: str,
        *,
        base: Base,
        metadata: Metadata,
        auto_class: str,
        private: bool | None = None,
        revision: str = DEFAULT_BRANCH,
        create_pr: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._remote = Remote(repo_id, revision, create_pr=create_pr)
        self._base, self._metadata, self._private = base, metadata, private
        self._auto_class = auto_class
        self._progress = progress or Silent()
        self._waiting = f"pissa-upload-{digest[:12]}"
        self._stopped = Event()
        target = open_target(self._remote, base, metadata, private)
        self.notes = target.notes
        head = target.make()
        self._remote.create_branch(self._waiting, head.commit)
        waiting = self._remote.head(self._waiting)
        digests = {name: digest_of(file) for name, file in waiting.files.items()} if waiting else {}
        self._held = {name: digest for name, digest in digests.items() if digest is not None}

    @property
    def held(self) -> Mapping[str, FileDigest]:
        """Large files that wait on the Hub."""
        return self._held

    def add(self, name: str, path: Path, digest: FileDigest) -> None:
        """Upload a finished file, then remove the local one.

        Args:
            name: in the repository.
            path: where it lies; absent if it is held.
            digest: what it has to be.

        Raises:
            HubError: it was not taken, or :meth:`close` was called meanwhile.
            OutputError: it is not what it has to be.
        """
        if self._held.get(name) != digest:
            self._progress.expect(digest.size)
            upload = _Upload(partial(self._send, name, path, digest))
            while upload.is_alive():
                if self._stopped.is_set():
                    raise HubError(f"{name} is no longer waited for", CARRY_ON)
                upload.join(_POLL_SECONDS)
            if upload.error is not None:
                raise upload.error
            self._held[name] = digest
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let nobody wait in :meth:`add`, from any thread."""
        self._stopped.set()

    def commit(self, folder: Path) -> Published:
        """Make the release of a finished folder and what waits, in one commit.

        Args:
            folder: what ``decompose`` wrote; files that were added may be gone.

        Raises:
            VerificationError: what waits is not what the manifest names.
            MovedError: somebody else changed the branch; call it once more.
        """
        release = open_release(folder)
        gone = [name for name in release.digests if not (folder / name).exists()]
        for name in gone:
            if self._held.get(name) != release.digests[name]:
                raise VerificationError(
                    f"{name} is neither in {folder} nor in {self._remote.repo_id} on the Hub as the manifest says",
                    "name the repository that it was published in, or decompose into another folder",
                )
        target = open_target(self._remote, self._base, self._metadata, self._private)
        head = target.make()
        contents = full_contents(
            release, self._remote.repo_id, target.branch, target.metadata, on_hub=gone, auto_class=self._auto_class
        )
        changed, obsolete = target.changed(contents), target.obsolete(contents)
        there = {name: content for name, content in changed.items() if self._held.get(name) == content.digest}
        here = {name: content for name, content in changed.items() if name not in there}
        self._progress.expect(sum(content.digest.size for content in here.values()))
        operations = [
            *self._remote.copies(there, self._waiting),
            *self._remote.upload(here, self._progress),
            *self._remote.deletions(obsolete),
        ]
        info = self._remote.commit(operations, commit_message(release), head.commit) if operations else None
        if gone:
            place = {"repo_id": self._remote.repo_id, "commit": info.oid if info else head.commit}
            write_file_atomic(folder / _PLACE_NAME, json.dumps(place).encode())
        self._remote.delete_branch(self._waiting)
        return Published(
            repo_id=self._remote.repo_id,
            url=self._remote.url,
            commit=info and info.oid,
            pull_request=info and info.pr_url,
            uploaded={name: content.digest.size for name, content in changed.items()},
            deleted=tuple(obsolete),
            nbytes=sum(content.digest.size for content in contents.values()),
            private=target.private,
            notes=self.notes,
        )

    def abandon(self) -> None:
        """Delete what waits, as far as that can be done."""
        with suppress(HubError):
            self._remote.delete_branch(self._waiting)

    def _send(self, name: str, path: Path, digest: FileDigest) -> None:
        try:
            uploaded = self._remote.upload({name: Content(path, digest)}, self._progress, self._waiting)
        except VerificationError as error:
            raise OutputError(error.fact, error.remedy) from None
        self._remote.commit(uploaded, f"{name}, of an unfinished upload", None, self._waiting)


class _Upload(Thread):
    """A file on its way. The client cannot be interrupted, but it can be left alone."""

    def __init__(self, send: Callable[[], None]) -> None:
        super().__init__(name="upload", daemon=True)
        self._send = send
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._send()
        except BaseException as error:  # raised again where the work waits
            self.error = error


def published_place(folder: Path) -> str | None:
    """Where the shards of a decomposed folder went, as ``owner/name@commit``; None if they stayed, or never were."""
    try:
        place = json.loads((folder / _PLACE_NAME).read_bytes())
        return f"{place['repo_id']}@{place['commit']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
