"""What goes wrong on the way down from the Hub, each in one line with its remedy; ``publish_errors`` has the way up."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pissa_hub.errors import HubError, OutputError, PissaHubError
from pissa_hub.hub.transport import TransportError, status_of

_LOGIN = "run `hf auth login`"
_CARRY_ON = "check the connection and run the same command again"


@contextmanager
def hub_faults(repo_id: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Turn what the client raises about a repository into a :class:`HubError`.

    Args:
        repo_id, revision: as they were asked for.
        name: the file in hand, if it is one.
    """
    try:
        yield
    except PissaHubError:
        raise
    except (TransportError, OSError, EntryNotFoundError, HFValidationError) as error:
        raise _explained(error, repo_id, revision, name) from None


def _explained(error: Exception, repo_id: str, revision: str, name: str | None) -> PissaHubError:
    what = str(PurePath(repo_id) / name) if name else repo_id
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _explained(cause, repo_id, revision, name)
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        account = "this account has no access to it" if get_token() else "nobody is logged in"
        return HubError(f"{repo_id} is gated, and {account}", f"accept its terms at {page} and {_LOGIN}")
    if status_of(error) == 401 and not isinstance(error, RepositoryNotFoundError):
        return HubError(f"the Hub does not accept the token in use for {what}", f"{_LOGIN} with a valid one")
    if isinstance(error, RepositoryNotFoundError):
        fact = f"{repo_id} is neither a folder here nor a model on the Hub that this account may read"
        return HubError(fact, f"check the name, or {_LOGIN} with an account that may read it")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repo_id} has no revision {revision}", "give one of its branches, tags or commits")
    if isinstance(error, HFValidationError):
        return HubError(f"{repo_id} is neither a folder here nor a name that the Hub allows", "check the name")
    if isinstance(error, OfflineModeIsEnabled):
        fact = f"{what} is not on this disk, and HF_HUB_OFFLINE forbids to fetch it"
        return HubError(fact, f"unset it, or give a folder that `hf download {repo_id} --local-dir FOLDER` wrote")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return HubError(f"{repo_id} has no file {name} at {revision}", "check the repository")
    if status_of(error) is not None:
        remedy = f"check what this account may do, or {_LOGIN}" if status_of(error) == 403 else "try again later"
        return HubError(f"the Hub answers {what} with status {status_of(error)}", remedy)
    if isinstance(error, TransportError | ConnectionError | LocalEntryNotFoundError):
        fact = f"{what} is not on this disk, and {constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        return HubError(fact, _CARRY_ON)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space is left for {what}", "free some, or move the cache with HF_HOME")
    if isinstance(error, OSError) and error.errno is not None:
        path = error.filename or what
        return OutputError(f"{path} cannot be written: {error.strerror}", "check the folder and its permissions")
    return HubError(f"{what} did not arrive whole", _CARRY_ON)
