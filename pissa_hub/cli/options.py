"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from pissa_hub.errors import one_line
from pissa_hub.ranks import is_heard

DTYPES = ["float32", "bfloat16", "float16"]

output_option = click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
devices_option = click.option(
    "--devices",
    metavar="LIST",
    help="all, or names or numbers with commas, such as cuda:0,cuda:1: a process for each shares the work.",
)
keep_source_option = click.option(
    "--keep-source",
    type=bool,
    default=True,
    show_default="yes",
    metavar="yes|no",
    help="Keep shards from the Hub in its cache; no removes each when it is used, so that two are on the disk at most.",
)
private_option = click.option(
    "--private/--no-private", default=None, help="Of a new repository; private by default if the base is gated."
)
output_format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(["human", "json"]),
    default="human",
    show_default=True,
    help="Print for people, or one JSON object.",
)


def require_one_of_the_device_options(context: click.Context) -> None:
    """Raises UsageError if both ``--device`` and ``--devices`` are given."""
    if {*map(context.get_parameter_source, ("device", "devices"))} == {click.core.ParameterSource.COMMANDLINE}:
        raise click.UsageError("--device is for one process and --devices for several: give one of them.")


def print_notes(notes: Iterable[str]) -> None:
    for note in notes if _speaks() else ():
        click.echo(f"note: {one_line(note)}", err=True)


def print_result(output_format: str, result: dict[str, Any], text: Callable[[], str]) -> None:
    """One JSON object, or the text, made only if it is asked for."""
    if _speaks():
        click.echo(json.dumps(result) if output_format == "json" else text())


def print_done(
    output_format: str, output: Path, done: Mapping[str, Any], text: Callable[[], str], *, same: str
) -> None:
    """What was made of a folder; of one that was finished before, that it still is what was asked for.

    Args:
        output_format: as asked for.
        output: the folder.
        done: for JSON; ``was_finished`` decides on the text.
        text: of what was done now.
        same: what a finished folder is known by.
    """

    def said() -> str:
        return f"{output} is finished already: {same}; nothing to do" if done["was_finished"] else text()

    print_result(output_format, {"output": str(output), **done}, said)


def _speaks() -> bool:
    """Of several processes only rank 0, in a command that they share; others are run by each for itself."""
    return "devices" not in click.get_current_context().params or is_heard()
