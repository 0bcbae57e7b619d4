"""Where a release may go: whose place it is, who will see it, and what the licence asks of its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pissa_hub.errors import HubError
from pissa_hub.hub.card_data import Metadata, license_names
from pissa_hub.hub.publish_release import Base, Content
from pissa_hub.hub.publish_remote import DEFAULT_BRANCH, BaseStatus, Head, Remote, is_same
from pissa_hub.licenses import Terms, has_prefix, terms_of

# What a repository may hold before anything of ours is in it.
_HARMLESS = (".gitattributes", "readme.md", "license", "notice")


@dataclass(frozen=True)
class Target:
    """A place on the Hub that a release may go to.

    Attributes:
        remote: the repository.
        exists: whether it does.
        head: of the branch, or of the default branch where that will be branched off; None without a repository.
        has_branch: whether ``head`` is the branch's own.
        private: what a new repository will be; None for the account's default.
        metadata: for the card.
        notes: sentences for the user.
        ours: names that an earlier release put there.
    """

    remote: Remote
    exists: bool
    head: Head | None = field(repr=False)
    has_branch: bool
    private: bool | None
    metadata: Metadata
    notes: tuple[str, ...]
    ours: frozenset[str] = field(repr=False)

    @property
    def branch(self) -> str | None:
        """The branch's name, where it is not the default one."""
        return None if self.remote.branch == DEFAULT_BRANCH else self.remote.branch

    def make(self) -> Head:
        """Create what is missing of repository and branch."""
        if not self.exists:
            self.remote.create(self.private)
        if self.branch and not self.has_branch:
            self.remote.create_branch(self.branch, self.head.commit if self.head else None)
        elif self.head is not None:
            return self.head
        head = self.remote.head()
        if head is None:
            raise HubError(f"{self.remote.repo_id} is not there after it was made", "run the same command again")
        return head

    def changed(self, contents: Mapping[str, Content]) -> dict[str, Content]:
        """Those that the branch lacks or has otherwise."""
        files = self.head.files if self.head else {}
        return {name: content for name, content in contents.items() if not is_same(content, files.get(name))}

    def obsolete(self, contents: Mapping[str, Content]) -> list[str]:
        """What an earlier release put there and this one has not."""
        return sorted(self.ours - contents.keys())


def open_target(remote: Remote, base: Base, metadata: Metadata, private: bool | None) -> Target:
    """Look at a place without changing it.

    Args:
        remote: the repository.
        base: what the release was made from.
        metadata: what the folder's card says of it.
        private: what the user asked for; None for the default.

    Raises:
        HubError: somebody else's files are there, more people would see them than may, or the licence asks for
            another name.
    """
    head = remote.head()
    exists = head is not None or remote.exists()
    has_branch = head is not None
    if head is None and exists:
        head = remote.head(DEFAULT_BRANCH)
    ours = frozenset() if head is None else _ours(remote, head)
    status = remote.base_status(base)
    metadata = {**(status.metadata if status else {}), **metadata}
    terms = terms_of(license_names(metadata, base.license))
    notes: list[str] = []
    private = _visibility(remote, head, _reason(base, status, terms), private, notes)
    is_public = not (head.is_private if head else private)
    _check_name(remote, terms, is_public, notes)
    return Target(remote, exists, head, has_branch, private, metadata, tuple(notes), ours)


def _ours(remote: Remote, head: Head) -> frozenset[str]:
    if ".gitignore" in head.files:
        raise HubError(f"{remote.repo_id} has a .gitignore, which may leave files out of a commit", "remove it there")
    ours = remote.published_names(head)
    if ours is not None:
        return ours
    foreign = sorted(name for name in head.files if not name.lower().startswith(_HARMLESS))
    if foreign:
        raise HubError(f"{remote.repo_id} holds something else, such as {foreign[0]}", "choose another name")
    return frozenset()


def _reason(base: Base, status: BaseStatus | None, terms: Terms) -> str | None:
    """Why not everybody may see what is made from a base; None if nothing is known against it."""
    if status is not None:
        what = "gated" if status.is_gated else "private" if status.is_private else None
        return None if what is None else f"{base.repo_id} is {what}, and this is made from it"
    if terms.is_restricted:
        return "the base is under a licence that its owner asks everybody to accept first"
    return None


def _visibility(
    remote: Remote, head: Head | None, reason: str | None, private: bool | None, notes: list[str]
) -> bool | None:
    name = remote.repo_id
    if head is None:
        if private is None and reason:
            notes.append(f"{name} will be private, for {reason}; --no-private overrides")
            return True
        return private
    if private and not head.is_private:
        raise HubError(f"{name} is public already", "make it private in its settings, or choose another name")
    if private is None and reason and not head.is_private:
        raise HubError(
            f"{name} is public, and {reason}", "choose another name, or give --no-private if all may have it"
        )
    if private is False and head.is_private:
        notes.append(f"{name} is private and stays so; its settings on the Hub change that")
    return head.is_private


def _check_name(remote: Remote, terms: Terms, is_public: bool, notes: list[str]) -> None:
    owner, _, name = remote.repo_id.rpartition("/")
    if terms.name_prefix is None or has_prefix(name, terms.name_prefix):
        return
    fact = f'the licence asks that a name that is made available begins with "{terms.name_prefix}"'
    if is_public:
        example = f"{owner}/{terms.name_prefix.replace(' ', '-')}-{name}"
        raise HubError(f"{fact}, and {name} does not", f"publish as {example} or --private")
    notes.append(f"{fact}: {name} does not, and may not become public under it")
