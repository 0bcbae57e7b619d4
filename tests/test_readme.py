"""README.md says what the program does: every command, every option, and a snippet that loads what it writes."""

from __future__ import annotations

import re
from pathlib import Path

import click

import pissa_hub
from pissa_hub.cli import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
NAMED = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", README))
OF_LAUNCHERS = {"--nproc-per-node", "--nnodes", "--max-restarts", "--ntasks", "--gpus-per-task", "--kill-on-bad-exit"}


def test_every_command_is_in_the_table_and_has_help() -> None:
    for name, command in cli.commands.items():
        assert re.search(rf"^\| `pissa-hub {name}\b", README, re.MULTILINE), name
        assert command.help


def test_every_option_is_named() -> None:
    for command in cli.commands.values():
        missing = [names for names in options_of(command) if NAMED.isdisjoint(names)]
        assert not missing, command.name


def test_every_verb_of_the_library_is_named() -> None:
    verbs = [name for name in pissa_hub.__all__ if name.islower() and not name.startswith("_")]
    assert len(verbs) > 5
    missing = [name for name in verbs if f"pissa_hub.{name}" not in README and f"pissa-hub {name}" not in README]
    assert not missing


def test_nothing_is_promised_that_the_program_lacks() -> None:
    known = {name for command in cli.commands.values() for names in options_of(command) for name in names}
    promised = {name for name in NAMED if name.startswith("--")} - {"--help"} - OF_LAUNCHERS
    assert promised <= known, promised - known


def options_of(command: click.Command) -> list[list[str]]:
    """The names of each option, and of each side of a switch."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    return [names for option in options for names in (option.opts, option.secondary_opts) if names]
