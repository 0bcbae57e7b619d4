"""How files come to a loopback Hub: upload modes, the large object store, Xet, and commits."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .api import Visit
from .errors import HubError
from .objects import Entry
from .repositories import BRANCH
from .wire import Answer, Call

if TYPE_CHECKING:
    from .server import LoopbackHub

PULL_REQUEST = "create_pr"


def preupload(visit: Visit) -> Answer:
    """POST .../preupload/{revision}: which files are large, and what is there already."""
    visit.require_write()
    known = visit.repository.commit(visit.rest[0]).tree
    files = []
    for file in visit.call.json()["files"]:
        large = visit.hub.is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        oid = known[file["path"]].etag if file["path"] in known else None
        mode = "lfs" if large else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer.of({"files": files})


def batch(visit: Visit) -> Answer:
    """POST /{id}.git/info/lfs/objects/batch: where to put each object that is not there."""
    visit.require_write()
    asked = visit.call.json()
    multipart = visit.hub.storage == "multipart" and "multipart" in asked.get("transfers", [])
    objects = [_upload(visit.hub, item["oid"], item["size"], multipart) for item in asked["objects"]]
    return Answer.of({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _upload(hub: LoopbackHub, sha256: str, size: int, multipart: bool) -> dict[str, Any]:
    known = {"oid": sha256, "size": size}
    if hub.objects.has(sha256):
        return known
    if not multipart:
        return {**known, "actions": {"upload": {"href": hub.signed("cdn", f"/upload/{sha256}")}}}
    parts = -(-size // hub.part_size)
    header = {str(number): hub.signed("cdn", f"/upload/{sha256}/{number}") for number in range(1, parts + 1)}
    href = hub.signed("hub", f"/lfs-complete/{sha256}")
    return {**known, "actions": {"upload": {"href": href, "header": {"chunk_size": str(hub.part_size), **header}}}}


def complete(hub: LoopbackHub, call: Call) -> Answer:
    """POST /lfs-complete/{sha256}: join the parts of a multipart upload."""
    hub.check_signature(call)
    sha256 = unquote(call.path).rsplit("/", 1)[-1]
    paths = [hub.objects.part(sha256, part["partNumber"]) for part in call.json()["parts"]]
    try:
        hub.objects.add((path.read_bytes() for path in paths), sha256)
    except (OSError, ValueError) as error:
        raise HubError(400, str(error)) from None
    for path in paths:
        path.unlink()
    return Answer.of({})


def xet_token(visit: Visit) -> Answer:
    """GET .../xet-write-token/{revision} and .../xet-read-token/{revision}."""
    role, _revision = visit.rest
    if not visit.hub.objects.with_xet:
        raise HubError(404, "No Xet storage here: set HF_HUB_DISABLE_XET=1 in the client's environment")
    if role == "write":
        visit.require_write()
    visit.require_files()
    access = {"casUrl": f"local://{visit.hub.objects.clone()}", "accessToken": "xet", "exp": int(time.time()) + 3600}
    headers = {
        "X-Xet-Cas-Url": str(access["casUrl"]),
        "X-Xet-Access-Token": str(access["accessToken"]),
        "X-Xet-Token-Expiration": str(access["exp"]),
    }
    return Answer.of(access, headers=headers)


def commit(visit: Visit) -> Answer:
    """POST .../commit/{revision}: all of it, or nothing."""
    visit.require_write()
    header, *operations = [json.loads(line) for line in visit.call.read().splitlines() if line.strip()]
    head = header["value"]
    repository, (revision,) = visit.repository, visit.rest
    parent = repository.commit(revision)
    if head.get("parentCommit") not in (None, parent.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    as_pull_request = visit.call.query.get(PULL_REQUEST) == "1"
    name = repository.pull_request() if as_pull_request else repository.ref(revision)
    if name is None or not name.startswith((BRANCH, "refs/pr/")):
        raise HubError(400, f"{revision} is not a branch")
    files = dict(parent.tree)
    large = [operation["value"]["oid"] for operation in operations if operation["key"] == "lfsFile"]
    visit.hub.objects.collect(large)
    for operation in operations:
        _apply(visit.hub, files, operation["key"], operation["value"])
    visit.hub.objects.publish(large)
    repository = repository.with_commit(name, parent, files, head["summary"], head.get("description", ""))
    visit.save(repository)
    sha = repository.refs[name]
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{visit.url}/commit/{sha}", "hookOutput": ""}
    if as_pull_request:
        answer["pullRequestUrl"] = f"{visit.url}/discussions/{name.rsplit('/', 1)[-1]}"
    return Answer.of(answer)


def _apply(hub: LoopbackHub, files: dict[str, Entry], key: str, value: Mapping[str, Any]) -> None:
    path = value["path"]
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
        raise HubError(400, f"Invalid path: {path}")
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        hub.objects.add([content])
        files[path] = Entry.regular(content)
    elif key == "lfsFile":
        if not hub.objects.has(value["oid"]):
            raise HubError(400, f"The LFS pointer of {path} points to a file that was not uploaded")
        size = hub.objects.path(value["oid"]).stat().st_size
        if value.get("size", size) != size:
            raise HubError(400, f"{path} has {size} bytes, not {value['size']}")
        files[path] = Entry.large(value["oid"], size)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
    elif key == "deletedFolder":
        for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    else:
        raise HubError(400, f"Unknown operation {key}")


ROUTES = [
    ("POST", "{api}/preupload/([^/]+)", preupload),
    ("POST", r"{page}\.git/info/lfs/objects/batch", batch),
    ("GET", "{api}/xet-(read|write)-token/([^/]+)", xet_token),
    ("POST", "{api}/commit/([^/]+)", commit),
]
