"""Errors of pissa_hub: one tree; each message is one line that names the fact and the remedy.

The command line prints the message and exits with ``exit_code``; library users catch :class:`PissaHubError`.
"""


class PissaHubError(Exception):
    """Base of every error that pissa_hub raises on purpose.

    Args:
        fact: what is wrong, naming the file, tensor or option.
        remedy: what the user can do about it, as an imperative clause.
    """

    exit_code = 1

    def __init__(self, fact: str, remedy: str) -> None:
        super().__init__(f"{fact}; {remedy}")
        self.fact = fact
        self.remedy = remedy


class CheckpointError(PissaHubError):
    """The source folder is not a readable safetensors checkpoint."""


class HeaderError(CheckpointError):
    """A safetensors header is malformed, truncated or inconsistent with its file."""


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
