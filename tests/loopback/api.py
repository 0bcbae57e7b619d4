"""The Hub's API: who asks, for which repository, and the answers about repositories and their references."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

from .errors import HubError
from .repositories import BRANCH, PULL_REQUEST, TAG, Repository
from .wire import Answer, Call

if TYPE_CHECKING:
    from .server import LoopbackHub

OWNER, STRANGER = "user", "stranger"
RESERVED = ("api", "datasets", "spaces")


@dataclass(frozen=True)
class Account:
    """Who asks: "user" owns every repository but those in the namespace "stranger"."""

    name: str | None
    may_write: bool = False

    def owns(self, repo_id: str) -> bool:
        return self.name is not None and (repo_id.split("/")[0] == STRANGER) == (self.name == STRANGER)


@dataclass(frozen=True)
class Visit:
    """A call that concerns a repository: what its path names, and who asks. ``rest`` are the further parts."""

    hub: LoopbackHub
    call: Call
    account: Account
    repository: Repository
    rest: tuple[str, ...]

    @property
    def repo_id(self) -> str:
        return self.repository.repo_id

    @property
    def url(self) -> str:
        """Of the repository's page."""
        prefix = "" if self.repository.kind == "model" else f"{self.repository.kind}s/"
        return f"{self.hub.endpoint}/{prefix}{self.repo_id}"

    @property
    def api_url(self) -> str:
        return f"{self.hub.endpoint}/api/{self.repository.kind}s/{self.repo_id}"

    def require_write(self) -> None:
        """Raises HubError, 401 or 403."""
        if self.account.name is None:
            raise HubError(401, "Invalid username or password.")
        if not (self.account.may_write and self.account.owns(self.repo_id)):
            raise HubError(403, "You don't have the required permissions to write to this repository")

    def require_files(self) -> None:
        """Raises HubError, 401 or 403 GatedRepo."""
        repository = self.repository
        if repository.gated and not (repository.granted and self.account.owns(self.repo_id)):
            status = 401 if self.account.name is None else 403
            message = f"Access to model {self.repo_id} is restricted and you are not in the authorized list."
            raise HubError(status, message, "GatedRepo")

    def save(self, repository: Repository) -> None:
        self.hub.repositories.save(repository)


Route = tuple[str, re.Pattern[str], Callable[[Visit], Answer]]


class Api:
    """Answers the calls to the Hub's own origin."""

    def __init__(self, hub: LoopbackHub) -> None:
        from . import downloads, uploads

        self.hub = hub
        self.routes: list[Route] = [*_routes(ROUTES), *_routes(downloads.ROUTES), *_routes(uploads.ROUTES)]

    def answer(self, call: Call) -> Answer:
        if call.path == "/api/validate-yaml":
            from .cards import validate

            return validate(call)
        if call.path.startswith("/lfs-complete/"):
            from .uploads import complete

            return complete(self.hub, call)
        account = self._account(call)
        with self.hub.lock:
            if call.path == "/api/whoami-v2":
                return _whoami(account)
            if call.path == "/api/repos/create":
                return self._create(call, account)
            if call.path == "/api/repos/delete":
                return self._delete(call, account)
            return self._visit(call, account)

    def _account(self, call: Call) -> Account:
        accounts = {
            None: Account(None),
            self.hub.token: Account(OWNER, may_write=True),
            self.hub.read_token: Account(OWNER),
            self.hub.stranger_token: Account(STRANGER, may_write=True),
        }
        if call.token not in accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return accounts[call.token]

    def _visit(self, call: Call, account: Account) -> Answer:
        for method, pattern, respond in self.routes:
            match = pattern.fullmatch(call.path)
            if match is None or method != ("GET" if call.method == "HEAD" else call.method):
                continue
            kind, namespace, name, *rest = (unquote(group or "") for group in match.groups())
            if not kind and namespace in RESERVED:
                continue
            repository = self._repository(kind.rstrip("s") or "model", f"{namespace}/{name}", account)
            return respond(Visit(self.hub, call, account, repository, tuple(rest)))
        raise HubError(
            404, f"Sorry, we can't find the page you are looking for: {call.method} {call.path}", "RepoNotFound"
        )

    def _repository(self, kind: str, repo_id: str, account: Account) -> Repository:
        """One that the account may see; the others are said not to exist."""
        hidden = HubError(404, "Repository not found", "RepoNotFound")
        if account.name is None:
            hidden = HubError(401, "Invalid username or password.", "RepoNotFound")
        if not self.hub.repositories.exists(kind, repo_id):
            raise hidden
        repository = self.hub.repositories.load(kind, repo_id)
        if repository.private and not account.owns(repo_id):
            raise hidden
        return repository

    def _create(self, call: Call, account: Account) -> Answer:
        asked = call.json()
        kind = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or account.name}/{asked['name']}"
        if not (account.may_write and account.owns(repo_id)):
            raise HubError(403, f"You don't have the rights to create a {kind} under this namespace")
        private = asked.get("private") or asked.get("visibility") == "private"
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if self.hub.repositories.exists(kind, repo_id):
            return Answer.of({"error": f"You already created this {kind} repo", "url": url}, 409)
        self.hub.create(repo_id, kind=kind, private=bool(private))
        return Answer.of({"url": url, "name": repo_id, "id": repo_id})

    def _delete(self, call: Call, account: Account) -> Answer:
        asked = call.json()
        kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or account.name}/{asked['name']}"
        repository = self._repository(kind, repo_id, account)
        Visit(self.hub, call, account, repository, ()).require_write()
        self.hub.repositories.delete(kind, repo_id)
        return Answer.of({})


def _whoami(account: Account) -> Answer:
    if account.name is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "loopback", "role": "write" if account.may_write else "read"}
    return Answer.of(
        {
            "type": "user",
            "id": account.name,
            "name": account.name,
            "fullname": account.name,
            "isPro": False,
            "orgs": [{"type": "org", "id": "org", "name": "org", "fullname": "org"}] if account.name == OWNER else [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def references(visit: Visit) -> Answer:
    def named(prefix: str) -> list[dict[str, str]]:
        refs = visit.repository.refs.items()
        return [
            {"name": name.removeprefix(prefix), "ref": name, "targetCommit": sha}
            for name, sha in refs
            if name.startswith(prefix)
        ]

    answer = {"branches": named(BRANCH), "tags": named(TAG), "converts": []}
    return Answer.of({**answer, "pullRequests": named(PULL_REQUEST)} if visit.call.query.get("include_prs") else answer)


def create_branch(visit: Visit) -> Answer:
    visit.require_write()
    (branch,) = visit.rest
    if visit.repository.ref(BRANCH + branch):
        raise HubError(409, f"Reference already exists: {BRANCH}{branch}")
    start = visit.repository.commit(visit.call.json().get("startingPoint") or "main")
    visit.save(visit.repository.with_ref(BRANCH + branch, start.sha))
    return Answer.of({})


def create_tag(visit: Visit) -> Answer:
    visit.require_write()
    (revision,) = visit.rest
    tag = visit.call.json()["tag"]
    if visit.repository.ref(TAG + tag):
        raise HubError(409, f"Tag reference already exists: {TAG}{tag}")
    visit.save(visit.repository.with_ref(TAG + tag, visit.repository.commit(revision).sha))
    return Answer.of({})


def _delete_ref(visit: Visit, prefix: str) -> Answer:
    visit.require_write()
    name = prefix + visit.rest[0]
    if visit.repository.ref(name) is None or name == BRANCH + "main":
        raise HubError(404, f"Reference does not exist: {name}", "RevisionNotFound")
    visit.save(visit.repository.with_ref(name, None))
    return Answer.of({})


def change_settings(visit: Visit) -> Answer:
    visit.require_write()
    asked = visit.call.json()
    private = asked.get("visibility", "private" if asked.get("private") else None)
    repository = replace(visit.repository, gated=asked.get("gated", visit.repository.gated))
    visit.save(repository if private is None else replace(repository, private=private == "private"))
    return Answer.of({})


def allow(visit: Visit) -> Answer:
    visit.require_files()
    return Answer.of({})


ROUTES = [
    ("GET", "{api}/refs", references),
    ("GET", "{api}/auth-check", allow),
    ("POST", "{api}/branch/([^/]+)", create_branch),
    ("DELETE", "{api}/branch/([^/]+)", lambda visit: _delete_ref(visit, BRANCH)),
    ("POST", "{api}/tag/([^/]+)", create_tag),
    ("DELETE", "{api}/tag/([^/]+)", lambda visit: _delete_ref(visit, TAG)),
    ("PUT", "{api}/settings", change_settings),
]


def _routes(routes: Iterable[tuple[str, str, Callable[[Visit], Answer]]]) -> list[Route]:
    """Compile paths, where {api} and {page} stand for a repository's API and page: kind, namespace, name."""
    api, page = "/api/(models|datasets|spaces)/([^/]+)/([^/]+)", "/(?:(datasets|spaces)/)?([^/]+)/([^/]+?)"
    return [
        (method, re.compile(path.replace("{api}", api).replace("{page}", page)), respond)
        for method, path, respond in routes
    ]
