"""What a loopback Hub tells about a repository's files, and the files."""

from __future__ import annotations

from hashlib import sha1
from typing import Any
from urllib.parse import quote, urlencode

from .api import Visit
from .cards import metadata
from .errors import HubError
from .objects import Entry, pointer
from .repositories import Commit
from .server import cdn_path
from .wire import Answer


def info(visit: Visit) -> Answer:
    """GET /api/models/{id} and /api/models/{id}/revision/{revision}."""
    repository = visit.repository
    commit = repository.commit(visit.rest[0] if visit.rest else "main")
    with_blobs = "blobs" in visit.call.query
    card = card_metadata(visit, commit)
    return Answer.of(
        {
            "_id": sha1(visit.repo_id.encode()).hexdigest()[:24],
            "id": visit.repo_id,
            "modelId": visit.repo_id,
            "author": visit.repo_id.split("/")[0],
            "sha": commit.sha,
            "createdAt": repository.history(commit.sha)[-1].date,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [*card.get("tags", []), *([f"license:{card['license']}"] if "license" in card else [])],
            **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
            "cardData": card or None,
            "siblings": [_sibling(path, entry, with_blobs) for path, entry in commit.tree.items()],
            "usedStorage": sum({entry.sha256: entry.size for entry in commit.tree.values()}.values()),
        }
    )


def card_metadata(visit: Visit, commit: Commit) -> dict[str, Any]:
    """The README's front matter; none that YAML cannot read."""
    entry = commit.tree.get("README.md")
    try:
        return metadata(visit.hub.objects.path(entry.sha256).read_text("utf-8")) if entry else {}
    except ValueError:
        return {}


def _sibling(path: str, entry: Entry, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    large = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(pointer(entry.sha256, entry.size))}
    blob = {"rfilename": path, "size": entry.size, "blobId": entry.blob_id}
    return {**blob, "lfs": large} if entry.lfs else blob


def tree(visit: Visit) -> Answer:
    """GET .../tree/{revision}[/{folder}], a page at a time."""
    revision, folder = visit.rest
    query = visit.call.query
    commit = visit.repository.commit(revision)
    prefix = f"{folder}/" if folder else ""
    if folder and not any(path.startswith(prefix) for path in commit.tree):
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    recursive = query.get("recursive", "").lower() in ("true", "1")
    expand = query.get("expand", "").lower() in ("true", "1")
    items = [
        _item(visit, commit, path, expand)
        for path in _paths(commit)
        if path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))
    ]
    start = int(query.get("cursor", 0))
    end = start + visit.hub.page_size
    headers = {}
    if end < len(items):
        following = f"{visit.hub.endpoint}{visit.call.path}?{urlencode({**query, 'cursor': end})}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer.of(items[start:end], headers=headers)


def paths_info(visit: Visit) -> Answer:
    """POST .../paths-info/{revision}; a path that does not exist is left out."""
    commit = visit.repository.commit(visit.rest[0])
    form = visit.call.form()
    expand = any(key == "expand" and str(value).lower() == "true" for key, value in form)
    known = set(_paths(commit))
    asked = [str(value).strip("/") for key, value in form if key == "paths"]
    return Answer.of([_item(visit, commit, path, expand) for path in asked if path in known])


def _paths(commit: Commit) -> list[str]:
    """Files and the folders that hold them."""
    folders = {path.rsplit("/", depth)[0] for path in commit.tree for depth in range(1, path.count("/") + 1)}
    return sorted([*commit.tree, *folders])


def _item(visit: Visit, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    last = {"lastCommit": {"id": commit.sha, "title": commit.title, "date": commit.date}} if expand else {}
    if path not in commit.tree:
        return {"type": "directory", "path": path, "size": 0, "oid": sha1(path.encode()).hexdigest(), **last}
    entry = commit.tree[path]
    item = {"type": "file", "path": path, "size": entry.size, "oid": entry.blob_id, **last}
    if entry.lfs:
        size = len(pointer(entry.sha256, entry.size))
        item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
        if xet_hash := visit.hub.objects.xet_hash(entry.sha256):
            item["xetHash"] = xet_hash
    return item


def commits(visit: Visit) -> Answer:
    """GET .../commits/{revision}, newest first."""
    return Answer.of(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": "user"}],
                "date": commit.date,
            }
            for commit in visit.repository.history(visit.rest[0])
        ]
    )


def resolve(visit: Visit) -> Answer:
    """GET /{id}/resolve/{revision}/{path}: a regular file, or the way to a large one on the CDN."""
    visit.require_files()
    revision, path = visit.rest
    commit = visit.repository.commit(revision)
    if path not in commit.tree:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    entry = commit.tree[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Disposition"] = f'inline; filename="{quote(path.rsplit("/", 1)[-1])}";'
    if not entry.lfs:
        return Answer(visit.hub.objects.path(entry.sha256), headers=headers)
    location = visit.hub.signed("cdn", cdn_path(visit.repo_id, entry.sha256, path))
    headers |= {"Location": location, "X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
    if xet_hash := visit.hub.objects.xet_hash(entry.sha256):
        headers["X-Xet-Hash"] = xet_hash
        headers["Link"] = f'<{visit.api_url}/xet-read-token/{commit.sha}>; rel="xet-auth"'
    return Answer(status=302, headers=headers)


ROUTES = [
    ("GET", "{api}", info),
    ("GET", "{api}/revision/([^/]+)", info),
    ("GET", "{api}/tree/([^/]+)(?:/(.+))?", tree),
    ("POST", "{api}/paths-info/([^/]+)", paths_info),
    ("GET", "{api}/commits/([^/]+)", commits),
    ("GET", "{page}/resolve/([^/]+)/(.+)", resolve),
]
