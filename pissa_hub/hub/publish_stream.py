"""Publishing while decomposing: each finished shard goes to the Hub at once, and the release appears in one commit.

Shards wait on a branch of their own, named after the plan, so that an interrupted run finds there what it need not make
again, though the local files are gone. The last commit copies them, which moves no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import VerificationError
from pissa_hub.hub.card_data import Metadata
from pissa_hub.hub.publish import commit_message
from pissa_hub.hub.publish_release import Base, Content, full_contents, open_release
from pissa_hub.hub.publish_remote import DEFAULT_BRANCH, Remote, digest_of
from pissa_hub.hub.publish_target import open_target
from pissa_hub.progress import Progress, Silent


class Publication:
    """A release of a decomposition that is still being made.

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
        """Upload a finished file; when this returns, the local one may go.

        Args:
            name: in the repository.
            path: where it lies.
            digest: what it has to be.
        """
        if self._held.get(name) == digest:
            return
        self._progress.expect(digest.size)
        uploaded = self._remote.upload({name: Content(path, digest)}, self._progress, self._waiting)
        self._remote.commit(uploaded, f"{name}, of an unfinished upload", None, self._waiting)
        self._held[name] = digest

    def commit(self, folder: Path) -> Any:
        """Make the release of a finished folder and what waits, in one commit, and return the client's CommitInfo.

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
                    f"{name} is neither in {folder} nor on the Hub as the manifest says", "decompose once more"
                )
        target = open_target(self._remote, self._base, self._metadata, self._private)
        head = target.make()
        contents = full_contents(
            release, self._remote.repo_id, target.branch, target.metadata, on_hub=gone, auto_class=self._auto_class
        )
        changed = target.changed(contents)
        there = {name: content for name, content in changed.items() if self._held.get(name) == content.digest}
        here = {name: content for name, content in changed.items() if name not in there}
        self._progress.expect(sum(content.digest.size for content in here.values()))
        operations = [
            *self._remote.copies(there, self._waiting),
            *self._remote.upload(here, self._progress),
            *self._remote.deletions(target.obsolete(contents)),
        ]
        info = self._remote.commit(operations, commit_message(release), head.commit) if operations else None
        self._remote.delete_branch(self._waiting)
        return info
