"""A small folder that appears whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pissa_hub.checkpoint.lock import opened_alone
from pissa_hub.checkpoint.writer import make_folder, sync_folder, writing
from pissa_hub.errors import OutputError


@contextmanager
def folder_that_appears_whole(output: Path) -> Iterator[Path]:
    """A folder to fill with durable files, which takes the name of ``output`` when all went well and else disappears.

    Args:
        output: absent or an empty folder.

    Raises:
        OutputError: it cannot be created, or somebody else has filled it meanwhile.
    """
    output = output.absolute()
    absent = [path for path in output.parents if not path.exists()]
    try:
        make_folder(output.parent)
        _remove_left_overs(output)
        with _locked_folder(output) as partial_folder:
            try:
                yield partial_folder
                _give_name(partial_folder, output)
            except OutputError as error:
                raise OutputError(error.fact.replace(str(partial_folder), str(output)), error.remedy) from error
            finally:
                shutil.rmtree(partial_folder, ignore_errors=True)
    except BaseException:  # an interrupt, too, leaves no folder
        for folder in absent:
            with suppress(OSError):  # somebody else's files in it
                folder.rmdir()
        raise


def _remove_left_overs(output: Path) -> None:
    """Of runs that were killed; whoever is alive holds a lock."""
    name = re.compile(rf"\.{re.escape(output.name)}\.\d+-[0-9a-f]{{8}}\.partial")
    with suppress(OSError):
        for folder in output.parent.iterdir():
            if name.fullmatch(folder.name):
                with suppress(OSError), opened_alone(folder) as is_alone:
                    if is_alone:
                        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_folder(output: Path) -> Iterator[Path]:
    """A new folder beside ``output``."""
    while True:
        folder = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        with ExitStack() as stack:
            with writing(output):
                folder.mkdir()
                try:
                    is_alone = stack.enter_context(opened_alone(folder))
                except FileNotFoundError:
                    continue
            if is_alone:  # else somebody takes it for a left-over, in the moment before it was locked
                yield folder
                return


def _give_name(folder: Path, output: Path) -> None:
    with writing(output):
        try:
            if output.exists():
                output.rmdir()
            folder.rename(output)
        except OSError:
            if output.is_dir() and any(output.iterdir()):
                fact = f"{output} was filled by somebody else meanwhile"
                raise OutputError(fact, "run this command again to compare, or choose another folder") from None
            raise
        sync_folder(output.parent)
