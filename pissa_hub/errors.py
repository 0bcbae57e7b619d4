"""Errors of pissa_hub: one tree; each message is one line that names the fact and the remedy.

The command line prints the message and exits with ``exit_code``; library users catch :class:`PissaHubError`.
"""

import re

# The remedy for whatever interrupts work that is kept.
CARRY_ON = "run the same command again to carry on"
_MAX_CHARS = 1000
_LONG_WORD = re.compile(r"(\S{200})\S{100,}(\S{100})")


class PissaHubError(Exception):
    """Base of every error that pissa_hub raises on purpose.

    Args:
        fact: what is wrong, naming the file, tensor or option.
        remedy: what the user can do about it, as an imperative clause.
    """

    exit_code = 1

    def __init__(self, fact: str, remedy: str) -> None:
        fact, remedy = one_line(fact), one_line(remedy)
        super().__init__(f"{fact}; {remedy}")
        self.fact = fact
        self.remedy = remedy


class CheckpointError(PissaHubError):
    """The source folder is not a readable safetensors checkpoint."""


class HeaderError(CheckpointError):
    """A safetensors header is malformed, truncated or inconsistent with its file."""


class ReadError(CheckpointError):
    """A file could not be read to its end or changed meanwhile: no fault of the checkpoint, so what is done stays."""


class TargetError(PissaHubError):
    """The requested target modules, ranks or patterns do not fit the model."""


class PlanError(PissaHubError):
    """An option has a value that cannot be used."""


class MatrixError(PissaHubError):
    """A weight cannot be decomposed: non-finite values or an unsupported storage."""


class OutputError(PissaHubError):
    """The output folder cannot be used: foreign content, too little space, another plan's work."""


class HubError(PissaHubError):
    """The Hub cannot be reached, or refuses or lacks what is asked of it."""


class ManifestError(PissaHubError):
    """A manifest, plan or receipt is missing, malformed or of another version."""


class VerificationError(PissaHubError):
    """Files on disk differ from what the manifest promises."""


class AdapterError(PissaHubError):
    """An adapter cannot be read, converted or merged, or belongs to another base or initialisation."""


class PeerError(PissaHubError):
    """Another of the processes that share the work died, failed or never came."""


class ResourceError(PissaHubError):
    """The machine has too little memory."""


def one_line(text: str) -> str:
    """One line that a terminal only shows: paths and names may hold anything."""
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    shown = _LONG_WORD.sub(r"\1…\2", shown)
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS - 1]}…"
