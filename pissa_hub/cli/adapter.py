"""What is done with an adapter: ``convert``, ``merge``, ``restore``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pissa_hub.cli.options import (
    DTYPES,
    device_option,
    devices_option,
    keep_source_option,
    output_format_option,
    output_option,
    print_done,
    print_notes,
    require_one_of_the_device_options,
)


class _Rank(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """``exact``, ``auto`` or a number."""

    name = "exact|N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        text = str(value)
        return int(text) if text.isdecimal() and len(text) < 10 else text


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--init", type=click.Path(path_type=Path), metavar="DIR", help="What the adapter started from.")
@output_option
@click.option(
    "--rank",
    type=_Rank(),
    metavar="exact|N|auto",
    default="exact",
    show_default=True,
    help="Rank of the LoRA: every direction that training changed, a number, or the smallest within --max-error.",
)
@click.option("--max-error", type=float, help="Largest relative error of a module's change, for --rank auto.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the LoRA.")
@click.option(
    "--for",
    "server",
    type=click.Choice(["peft", "vllm", "sglang", "llama.cpp", "tgi", "ollama"]),
    default="peft",
    show_default=True,
    help="Write what this server accepts.",
)
@click.option("--base-model", metavar="ID", help="Hub id of the original model, where the manifest does not name it.")
@click.option("--trust-init", is_flag=True, help="Do not compare the adapter's content with --init.")
@device_option
@output_format_option
def convert(adapter: Path, init: Path | None, output: Path, output_format: str, **options: Any) -> None:
    """Turn the PiSSA adapter in ADAPTER into a standard LoRA for the original base.

    DIR is what decompose wrote, its pissa_init folder, or what a trainer saved before the first step.
    """
    from pissa_hub import report
    from pissa_hub.adapter.convert import convert as run_convert
    from pissa_hub.adapter.initial import require_init
    from pissa_hub.progress import Bar

    init = require_init(adapter, init)
    with Bar() as bar:
        conversion = run_convert(adapter, init, output, progress=bar, **options)
    record = conversion.record
    print_notes(record.notes)
    print_done(
        output_format,
        output,
        {"was_finished": conversion.was_finished, **report.conversion_json(record)},
        lambda: f"{report.conversion_text(record)}\n\n{adapter} -> {output}: {report.total_size(record.files)}",
        same="same adapter, same init, same settings",
    )


@click.command()
@click.argument("residual", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--dtype",
    type=click.Choice(["source", *DTYPES]),
    default="source",
    show_default=True,
    help="Of the result; source is each tensor's in the original.",
)
@click.option("--trust-init", is_flag=True, help="Do not compare the adapter's content with the residual's pissa_init.")
@keep_source_option
@device_option
@devices_option
@output_format_option
def merge(residual: Path, adapter: Path, output: Path, output_format: str, **options: Any) -> None:
    """Merge the trained adapter in ADAPTER into the base in RESIDUAL: a full checkpoint in the source's layout.

    DoRA, biases, embeddings and whole modules too. An adapter that convert wrote is merged into the original base.
    A run that was interrupted carries on when the same command is given again.
    """
    from pissa_hub import report
    from pissa_hub.adapter.merge import merge as run_merge
    from pissa_hub.progress import Bar

    require_one_of_the_device_options(click.get_current_context())
    with Bar() as bar:
        merged = run_merge(residual, adapter, output, progress=bar, **options)
    print_notes(merged.record.notes)
    print_done(
        output_format,
        output,
        {"was_finished": merged.was_finished, "carried_over": merged.carried_over, **asdict(merged.record)},
        lambda: f"{residual} + {adapter} -> {output}: {report.total_size(merged.record.files)}",
        same="same base, same adapter, same settings",
    )


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--init", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder with manifest and pissa_init."
)
@output_option
@keep_source_option
@device_option
@devices_option
@output_format_option
def restore(source: Path, init: Path, output: Path, output_format: str, **options: Any) -> None:
    """Write what decompose wrote of SOURCE once more, byte for byte, from its pissa_init: no SVD.

    A run that was interrupted carries on when the same command is given again.
    """
    from pissa_hub import report
    from pissa_hub.adapter.restore import restore as run_restore
    from pissa_hub.progress import Bar

    require_one_of_the_device_options(click.get_current_context())
    with Bar() as bar:
        restored = run_restore(source, init, output, progress=bar, **options)
    manifest, files = restored.manifest, restored.manifest.files
    print_done(
        output_format,
        output,
        {
            "was_finished": restored.was_finished,
            "carried_over": restored.carried_over,
            **report.manifest_json(manifest),
        },
        lambda: f"{source} + {init} -> {output}: {report.total_size(files)}, {len(files)} files as in the manifest",
        same="same source, same manifest",
    )
