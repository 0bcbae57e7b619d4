"""A small folder that appears whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pissa_hub.errors import OutputError


@contextmanager
def folder_that_appears_whole(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name of ``output`` when all went well and else disappears.

    Args:
        output: absent or an empty folder.

    Raises:
        OutputError: it cannot be created.
    """
    absent = [path for path in output.absolute().parents if not path.exists()]
    for left in output.absolute().parent.glob(f".{glob.escape(output.name)}.*.partial"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial_folder = output.absolute().with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial_folder.mkdir(parents=True)
    except OSError as error:
        fact = f"{output} cannot be created: {error.strerror}"
        raise OutputError(fact, "choose another folder or check the permissions") from error
    try:
        yield partial_folder
        if output.exists():
            output.rmdir()
        partial_folder.rename(output.absolute())
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        for folder in absent:
            with suppress(OSError):  # somebody else's files in it
                folder.rmdir()
        raise
