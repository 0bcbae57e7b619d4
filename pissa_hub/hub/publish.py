"""``publish``: a finished folder as a repository on the Hub, verified first, changed there in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_hub import __version__
from pissa_hub.errors import PlanError
from pissa_hub.hub.publish_release import (
    PLOT_NAME,
    Content,
    Release,
    check_release,
    full_contents,
    initial_adapter_contents,
    open_release,
)
from pissa_hub.hub.publish_remote import DEFAULT_BRANCH, Remote
from pissa_hub.hub.publish_target import Target, open_target
from pissa_hub.progress import Progress, Silent


@dataclass(frozen=True)
class Published:
    """What a call of :func:`publish` did, or would do.

    Attributes:
        repo_id, url: of the repository, with its owner.
        commit: 40 hex digits; None if nothing was to be changed, or for a dry run.
        pull_request: its address, if one was opened.
        uploaded: name -> size in bytes of the files that the branch lacked or had otherwise.
        deleted: names of an earlier release's files that this one has not.
        nbytes: of the whole release.
        private: whether the repository is; None for the account's default.
        notes: sentences for the user.
    """

    repo_id: str
    url: str
    commit: str | None
    pull_request: str | None
    uploaded: Mapping[str, int]
    deleted: tuple[str, ...]
    nbytes: int
    private: bool | None
    notes: tuple[str, ...]

    @property
    def is_unchanged(self) -> bool:
        """Whether the branch had this release already."""
        return not (self.uploaded or self.deleted)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str = DEFAULT_BRANCH,
    create_pr: bool = False,
    adapter_only: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Publish what decompose, convert or merge wrote.

    The branch changes in one commit, or not at all if somebody else changes it meanwhile. A call that was interrupted
    is repeated: what was uploaded is not uploaded twice, and a release that is there already is left as it is.

    Args:
        folder: verified before anything is created or sent.
        repo_id: ``owner/name``; created if there is none.
        private: of a new repository; by default private if the base is gated, private or under a licence that has to
            be accepted, else what is usual for the account.
        revision: branch, created if there is none.
        create_pr: open a pull request instead.
        adapter_only: the initial adapter without the residual base, which ``restore`` makes anew from the original.
        dry_run: look at both sides, verify, and change nothing.
        progress: told how far it is.

    Raises:
        OutputError: the folder is unfinished or of another kind.
        VerificationError: it is not what its record says.
        HubError: no token, no right, no connection, or something else is there.
    """
    progress = progress or Silent()
    if create_pr and revision != DEFAULT_BRANCH:
        raise PlanError(f"a pull request goes to {DEFAULT_BRANCH}, not to {revision}", "leave out --revision")
    release = open_release(folder)
    if adapter_only and release.kind != "decomposition":
        raise PlanError(f"{folder} is a {release.kind}, and has no initial adapter", "leave out --adapter-only")
    remote = Remote(repo_id, revision, create_pr=create_pr)
    target = open_target(remote, release.base, release.metadata, private)
    check_release(release, progress)
    make_contents = initial_adapter_contents if adapter_only else full_contents
    contents = make_contents(release, remote.repo_id, target.branch, target.metadata)
    notes = list(target.notes)
    if release.kind == "decomposition" and not adapter_only and PLOT_NAME not in contents:
        notes.append("no plot of the spectra without matplotlib: `pip install 'pissa_hub[plot]'`")
    changed, obsolete = target.changed(contents), target.obsolete(contents)
    info = None
    if not dry_run and (changed or obsolete):
        info = _send(target, changed, obsolete, commit_message(release, adapter_only=adapter_only), progress)
    return Published(
        repo_id=remote.repo_id,
        url=remote.url,
        commit=info and info.oid,
        pull_request=info and info.pr_url,
        uploaded={name: content.digest.size for name, content in changed.items()},
        deleted=tuple(obsolete),
        nbytes=sum(content.digest.size for content in contents.values()),
        private=target.private,
        notes=tuple(notes),
    )


def commit_message(release: Release, *, adapter_only: bool = False) -> str:
    what = "PiSSA initial adapter" if adapter_only else _WHAT[release.kind]
    return f"{what}, by pissa_hub {__version__}"


_WHAT = {"decomposition": "PiSSA residual base and adapter", "merge": "Merged model", "conversion": "LoRA adapter"}


def _send(target: Target, changed: Mapping[str, Content], obsolete: list[str], message: str, progress: Progress) -> Any:
    progress.expect(sum(content.digest.size for content in changed.values()))
    head = target.make()
    operations = [*target.remote.upload(changed, progress), *target.remote.deletions(obsolete)]
    return target.remote.commit(operations, message, head.commit)
