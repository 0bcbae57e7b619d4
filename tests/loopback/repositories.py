"""Repositories of a loopback Hub: commits, branches, tags and pull requests, persistent as one JSON file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from hashlib import sha1
from pathlib import Path
from typing import Any

from .errors import HubError
from .objects import Entry

EPOCH = datetime(2025, 1, 1, tzinfo=timezone.utc)
BRANCH, TAG, PULL_REQUEST = "refs/heads/", "refs/tags/", "refs/pr/"


@dataclass(frozen=True)
class Commit:
    """A commit; its sha follows from everything else in it, so the same history has the same shas."""

    parent: str | None
    title: str
    message: str
    tree: Mapping[str, Entry]
    depth: int

    @property
    def sha(self) -> str:
        return sha1(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def date(self) -> str:
        """A minute after the parent's, in ISO 8601."""
        return (EPOCH + timedelta(minutes=self.depth)).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Repository:
    """One repository: ``refs`` by full name to commit shas; ``granted`` says whether the owner may read gated files."""

    kind: str
    repo_id: str
    private: bool = False
    gated: str | bool = False
    granted: bool = True
    refs: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, Commit] = field(default_factory=dict)

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None if there is none of that name."""
        names = [revision] if revision.startswith("refs/") else [BRANCH + revision, TAG + revision]
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request ("refs/pr/1") or full sha.

        Raises:
            HubError: 404 RevisionNotFound.
        """
        name = self.ref(revision)
        sha = self.refs[name] if name else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """From a revision back to the first commit."""
        commits = [self.commit(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def with_ref(self, name: str, sha: str | None) -> Repository:
        """With a ref set, or removed where the sha is None."""
        refs = {key: value for key, value in self.refs.items() if key != name}
        return replace(self, refs=refs if sha is None else {**refs, name: sha})

    def with_commit(
        self, name: str, parent: Commit | None, tree: Mapping[str, Entry], title: str, message: str = ""
    ) -> Repository:
        """With a commit on top of ``parent`` and the ref ``name`` pointing at it."""
        ordered = {path: tree[path] for path in sorted(tree)}
        depth = 0 if parent is None else parent.depth + 1
        commit = Commit(parent.sha if parent else None, title, message, ordered, depth)
        return replace(self, commits={**self.commits, commit.sha: commit}).with_ref(name, commit.sha)

    def pull_request(self) -> str:
        """The ref of the next pull request."""
        return f"{PULL_REQUEST}{1 + sum(name.startswith(PULL_REQUEST) for name in self.refs)}"


class RepositoryStore:
    """The repositories in a folder. A change is one atomic replacement of a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repos"
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, kind: str, repo_id: str) -> Path:
        return self.folder / f"{kind}--{repo_id.replace('/', '--')}.json"

    def exists(self, kind: str, repo_id: str) -> bool:
        return self._path(kind, repo_id).exists()

    def load(self, kind: str, repo_id: str) -> Repository:
        """Raises HubError, 404 RepoNotFound, for one that does not exist."""
        try:
            stored = json.loads(self._path(kind, repo_id).read_bytes())
        except FileNotFoundError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None
        commits = [_commit(item) for item in stored.pop("commits")]
        return Repository(**stored, commits={commit.sha: commit for commit in commits})

    def save(self, repository: Repository) -> None:
        path = self._path(repository.kind, repository.repo_id)
        stored = {**asdict(repository), "commits": [asdict(commit) for commit in repository.commits.values()]}
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(stored))
        draft.replace(path)

    def delete(self, kind: str, repo_id: str) -> None:
        self._path(kind, repo_id).unlink()


def _commit(stored: Mapping[str, Any]) -> Commit:
    return Commit(**{**stored, "tree": {path: Entry(**entry) for path, entry in stored["tree"].items()}})
