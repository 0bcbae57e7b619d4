"""The command line: parse, call, print. One module per group of commands."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from pissa_hub import __version__
from pissa_hub.cli.adapter import convert, merge, restore
from pissa_hub.cli.decompose import decompose
from pissa_hub.cli.examples import demo, recipes
from pissa_hub.cli.folders import inspect, publish, verify
from pissa_hub.errors import CARRY_ON, PissaHubError, PlanError
from pissa_hub.ranks import is_alone

# None of them shares its work, and several at once would be in each other's way.
_FOR_ONE_PROCESS = frozenset({"convert", "publish", "demo"})


@click.group(
    commands=[decompose, convert, merge, restore, publish, verify, inspect, recipes, demo],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, package_name="pissa_hub", prog_name="pissa-hub")
@click.pass_context
def cli(context: click.Context) -> None:
    """Turn Hugging Face checkpoints into PiSSA-ready ones: streamed, certified, resumable, verified."""
    if context.invoked_subcommand in _FOR_ONE_PROCESS and not is_alone():
        fact = f"{context.invoked_subcommand} is done by one process, and the environment says that there are several"
        raise PlanError(fact, "run it without torchrun or srun, or unset RANK")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console scripts; exits 0 done, 1 error, 2 wrong usage, 130 interrupted, 143 terminated."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it prints a stack when another process is gone
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="pissa-hub", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        is_terminated = isinstance(error.__cause__ or error, _Terminated)
        how = "terminated" if is_terminated else "interrupted"
        click.echo(f"{how}; {CARRY_ON}", err=True)
        _leave(128 + (signal.SIGTERM if is_terminated else signal.SIGINT))
    except (PissaHubError, OSError) as error:
        if os.environ.get("PISSA_HUB_DEBUG"):
            raise
        click.echo(f"error: {error if isinstance(error, PissaHubError) else _system_error(error)}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(0)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: of a batch system whose time is up, or of torchrun when another process failed."""


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: more would only disturb the tidying up
    raise _Terminated


def _interrupt(*_: object) -> NoReturn:
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))  # whoever presses twice means it
    raise KeyboardInterrupt


def _leave(code: int) -> NoReturn:
    """Exit, without the minutes that a thread may need for the weight that it has in hand."""
    if threading.active_count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _system_error(error: OSError) -> str:
    """What the library left to the system to say, such as a path in a folder that may not be entered."""
    return f"{error.filename or 'the system'}: {error.strerror or error}; check the path and its permissions"
