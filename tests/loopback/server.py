"""A Hub on 127.0.0.1 that the real client talks to: no Internet, no account, the same answers every time."""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from .api import Api
from .errors import HubError
from .faults import Fault, Faults
from .objects import Entry, ObjectStore
from .repositories import BRANCH, Commit, Repository, RepositoryStore
from .wire import Answer, Call, Origin, Request

Storage = Literal["basic", "multipart", "xet"]
WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN = "hf_loopbackWRITE", "hf_loopbackREAD", "hf_loopbackSTRANGER"
LARGE = (".safetensors", ".bin", ".gguf", ".h5", ".onnx", ".pt", ".npz", ".png", ".model")
LARGE_SIZE = 10_000_000
NO_PROXY = "127.0.0.1,localhost"


class LoopbackHub:
    """Two origins, the Hub and its CDN, over the state in a folder. They differ in host too: some clients ignore ports.

    Args:
        folder: holds everything; another hub on the same folder carries on where this one stopped.
        storage: how large files are uploaded: one PUT, several, or through hf_xet.
    """

    token = WRITE_TOKEN
    read_token = READ_TOKEN
    stranger_token = STRANGER_TOKEN

    def __init__(self, folder: Path, storage: Storage = "basic") -> None:
        self.folder = Path(folder)
        self.storage = storage
        self.page_size = 1000
        self.part_size = 64_000
        self.requests: list[Request] = []
        self.objects = ObjectStore(self.folder, storage == "xet")
        self.repositories = RepositoryStore(self.folder)
        self.lock = threading.RLock()
        self._faults = Faults()
        self._hub = Origin("hub", "127.0.0.1", Api(self).answer, self._faults, self.requests.append)
        self._cdn = Origin("cdn", "localhost", self._cdn_answer, self._faults, self.requests.append)

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; after :meth:`stop`, at the same addresses as before."""
        self._hub.start()
        self._cdn.start()

    def stop(self) -> None:
        """Drop every connection and stop listening, as a killed server does."""
        self._hub.stop()
        self._cdn.stop()

    @property
    def endpoint(self) -> str:
        return self._hub.url

    @property
    def cdn(self) -> str:
        return self._cdn.url

    def environment(self, token: str | None = WRITE_TOKEN, home: Path | None = None) -> dict[str, str]:
        """Variables for a process whose huggingface_hub shall use this hub.

        Args:
            token: sent by the client; None for an anonymous one.
            home: HF_HOME, with the caches; a folder of this hub's unless given.
        """
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.folder / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0" if token else "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": NO_PROXY,
            "no_proxy": NO_PROXY,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }
        return {**variables, "HF_HUB_DISABLE_XET": "0" if self.storage == "xet" else "1"}

    def create(self, repo_id: str, *, kind: str = "model", private: bool = False) -> Commit:
        """A repository with its first commit, which holds .gitattributes as on the Hub.

        Raises:
            HubError: 409 if it exists.
        """
        with self.lock:
            if self.repositories.exists(kind, repo_id):
                raise HubError(409, f"You already created this {kind} repo")
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
            self.objects.add([attributes])
            tree = {".gitattributes": Entry.regular(attributes)}
            repository = Repository(kind, repo_id, private).with_commit(BRANCH + "main", None, tree, "initial commit")
            self.repositories.save(repository)
            return repository.commit("main")

    def upload_folder(
        self, repo_id: str, folder: Path, *, revision: str = "main", message: str = "Upload folder", **create: Any
    ) -> Commit:
        """Commit a folder's files without a client; the repository is created if there is none."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.commit(repo_id, files, revision=revision, message=message, **create)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        *,
        revision: str = "main",
        message: str = "Change",
        kind: str = "model",
        **create: Any,
    ) -> Commit:
        """Commit contents, None for a file to delete, without a client; the repository is created if there is none."""
        with self.lock:
            if not self.repositories.exists(kind, repo_id):
                self.create(repo_id, kind=kind, **create)
            repository = self.repositories.load(kind, repo_id)
            parent = repository.commit(revision)
            tree = dict(parent.tree)
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = self.store(path, content)
            self.objects.publish(entry.sha256 for entry in tree.values() if entry.lfs)
            name = repository.ref(revision)
            assert name is not None, f"{revision} is no branch"
            repository = repository.with_commit(name, parent, tree, message)
            self.repositories.save(repository)
            return repository.commit(revision)

    def move(self, repo_id: str, branch: str = "main", to: str | None = None) -> Commit:
        """Move a branch, as somebody else might: to a revision, or on by one commit that adds moved.txt."""
        with self.lock:
            repository = self.repositories.load("model", repo_id)
            if to is None:
                return self.commit(repo_id, {"moved.txt": repository.commit(branch).sha.encode()}, revision=branch)
            name = repository.ref(branch)
            assert name is not None, f"there is no branch {branch}"
            self.repositories.save(repository.with_ref(name, repository.commit(to).sha))
            return repository.commit(to)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a revision's files."""
        tree = self.repositories.load("model", repo_id).commit(revision).tree
        return {path: self.objects.path(entry.sha256).read_bytes() for path, entry in tree.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last is the repository's creation."""
        return self.repositories.load("model", repo_id).history(revision)

    def exists(self, repo_id: str) -> bool:
        return self.repositories.exists("model", repo_id)

    def gate(self, repo_id: str, granted: bool = False) -> None:
        """Give out files only to those who accepted the terms: nobody, or with ``granted`` the owner of the tokens."""
        self._change(repo_id, gated="manual", granted=granted)

    def hide(self, repo_id: str) -> None:
        """Make a repository private."""
        self._change(repo_id, private=True)

    def _change(self, repo_id: str, **fields: Any) -> None:
        with self.lock:
            self.repositories.save(replace(self.repositories.load("model", repo_id), **fields))

    def fail(
        self,
        path: str,
        status: int | Literal["cut", "corrupt"] | None = 503,
        times: int = 1,
        *,
        after_bytes: int = 0,
        retry_after: int | None = 0,
        seconds: float = 0,
        action: Callable[[], object] | None = None,
        method: str | None = None,
        origin: Literal["hub", "cdn"] | None = None,
    ) -> None:
        """Let the next ``times`` requests go wrong whose path matches; the arguments are :class:`Fault`'s."""
        fault = Fault(path, status, after_bytes, retry_after, seconds, action, method, origin)
        self._faults.add(fault, times)

    def heal(self) -> None:
        """Forget the faults that have not happened."""
        self._faults.clear()

    def is_large(self, path: str, size: int, sample: bytes = b"") -> bool:
        """Whether a file goes to the large object store rather than into git."""
        return path.endswith(LARGE) or size > LARGE_SIZE or b"\0" in sample

    def store(self, path: str, content: bytes) -> Entry:
        sha256 = self.objects.add([content])
        large = self.is_large(path, len(content), content[:512]) and bool(content)
        return Entry.large(sha256, len(content)) if large else Entry.regular(content)

    def signed(self, origin: Literal["hub", "cdn"], path: str) -> str:
        """A URL whose path needs no token, for its query carries a signature."""
        url = self.endpoint if origin == "hub" else self.cdn
        return f"{url}{path}?Expires=4102444800&Signature={_signature(path)}&Key-Pair-Id=LOOPBACK"

    def check_signature(self, call: Call) -> None:
        """Raises HubError, 403, for a URL that this hub did not sign."""
        if not hmac.compare_digest(call.query.get("Signature", ""), _signature(call.path)):
            raise HubError(403, "Access denied: the signature does not match")

    def _cdn_answer(self, call: Call) -> Answer:
        """GET /{repository}/{sha256}/{path}, PUT /upload/{sha256} and PUT /upload/{sha256}/{part number}."""
        if "Authorization" in call.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        self.check_signature(call)
        if call.method == "PUT":
            return self._receive(call, *call.path.removeprefix("/upload/").split("/"))
        sha256 = next(part for part in call.path.split("/") if len(part) == 64)
        try:
            path = self.objects.path(sha256)
        except KeyError:
            raise HubError(404, "No such object") from None
        return Answer(path, headers={"Accept-Ranges": "bytes", "ETag": f'"{sha256}"'})

    def _receive(self, call: Call, sha256: str, number: str | None = None) -> Answer:
        if number is None:
            try:
                self.objects.add(call.body, sha256)
            except ValueError as error:
                raise HubError(400, str(error)) from None
            return Answer(headers={"ETag": f'"{sha256}"'})
        content = call.read()
        self.objects.part(sha256, int(number)).write_bytes(content)
        return Answer(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


def cdn_path(repo_id: str, sha256: str, path: str) -> str:
    return f"/{repo_id}/{sha256}/{quote(path)}"


def _signature(path: str) -> str:
    return hmac.new(b"loopback", unquote(path).encode(), hashlib.sha256).hexdigest()
