"""The command line: parse, call, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pissa_hub import __version__
from pissa_hub.errors import PissaHubError, PlanError

if TYPE_CHECKING:
    from pissa_hub.hub.publish_stream import Publication
    from pissa_hub.recipes import Recipe

_DTYPES = ["float32", "bfloat16", "float16"]
_output_format = click.option(
    "--format",
    "output_format",
    type=click.Choice(["human", "json"]),
    default="human",
    show_default=True,
    help="Print for people, or one JSON object.",
)


_keep_source = click.option(
    "--keep-source",
    type=bool,
    default=True,
    show_default="yes",
    metavar="yes|no",
    help="Keep shards from the Hub in its cache; no removes each when it is used, so that two are on the disk at most.",
)
_private = click.option(
    "--private/--no-private", default=None, help="Of a new repository; private by default if the base is gated."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="pissa_hub", prog_name="pissa-hub")
def cli() -> None:
    """Turn Hugging Face checkpoints into PiSSA-ready ones: streamed, certified, resumable, verified."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console scripts; exits 0 done, 1 error, 2 wrong usage, 130 interrupted."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="pissa-hub", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; run the same command again to carry on", err=True)
        sys.exit(130)
    except (PissaHubError, OSError) as error:
        if os.environ.get("PISSA_HUB_DEBUG"):
            raise
        click.echo(f"error: {error if isinstance(error, PissaHubError) else _system_error(error)}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(0)


def _system_error(error: OSError) -> str:
    """What the library left to the system to say, such as a path in a folder that may not be entered."""
    return f"{error.filename or 'the system'}: {error.strerror or error}; check the path and its permissions"


def _rank_pattern(values: Sequence[str]) -> dict[str, int]:
    pattern = {}
    for value in values:
        key, separator, rank = value.rpartition("=")
        if not (separator and key and rank.isdecimal()):
            raise click.UsageError(f"--rank-pattern takes KEY=RANK, not {value!r}")
        pattern[key] = int(rank)
    return pattern


@cli.command()
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--recipe", metavar="NAME|FILE", help="Take SOURCE and settings from a recipe, where they are not given here."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a SOURCE on the Hub, as SOURCE@REV.")
@click.option("--rank", default=16, show_default=True, help="Rank r of the adapter.")
@click.option("--alpha", type=float, help="lora_alpha; by default each weight's rank.")
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(r) instead of alpha / r.")
@click.option(
    "--targets",
    default="all-linear",
    show_default=True,
    metavar="all-linear|NAME,NAME|re:REGEX",
    help="Which modules to decompose.",
)
@click.option("--exclude", default="", metavar="NAME,NAME|re:REGEX", help="Modules to leave out.")
@click.option("--rank-pattern", multiple=True, metavar="KEY=R", help="Rank of modules that match KEY; repeatable.")
@click.option(
    "--method",
    type=click.Choice(["pissa"]),
    default="pissa",
    show_default=True,
    help="How adapter and residual follow from a weight.",
)
@click.option(
    "--svd",
    type=click.Choice(["krylov", "full", "randomized"]),
    default="krylov",
    show_default=True,
    help="How singular triplets are computed; krylov goes on until certified.",
)
@click.option("--niter", default=4, show_default=True, help="Power iterations of --svd randomized.")
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest certified loss of energy of --svd krylov.")
@click.option(
    "--adapter-dtype",
    type=click.Choice(_DTYPES),
    default="float32",
    show_default=True,
    help="Of A and B; their rounding goes to the residual.",
)
@click.option(
    "--residual-dtype",
    type=click.Choice(["source", *_DTYPES]),
    default="source",
    show_default=True,
    help="Of the decomposed weights in the base.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random start blocks.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_keep_source
@click.option(
    "--publish",
    "repo_id",
    metavar="REPO_ID",
    help="Upload each shard to the Hub when it is finished and remove it here; the release appears in one commit.",
)
@_private
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads headers only.")
@_output_format
def decompose(
    source: Path | None,
    output: Path | None,
    recipe: str | None,
    revision: str | None,
    rank_pattern: Sequence[str],
    rslora: bool,
    device: str,
    keep_source: bool,
    repo_id: str | None,
    private: bool | None,
    dry_run: bool,
    output_format: str,
    **options: Any,
) -> None:
    """Split the checkpoint in SOURCE into a residual base and a PiSSA adapter.

    SOURCE is a folder or, as wherever a folder is read, ORG/NAME[@REVISION] on the Hub; a folder of that name wins.
    A run that was interrupted carries on when the same command is given again. With --publish, shards wait on a branch
    pissa-upload-... of REPO_ID, which the finished run deletes; `hf repos branch delete` does it for a run that is
    given up.
    """
    from pissa_hub import report
    from pissa_hub.hub.card import load_snippet
    from pissa_hub.pipeline.decompose import open_publication, plan_decomposition, publishing_bytes, run
    from pissa_hub.pipeline.device import pick_device
    from pissa_hub.pipeline.job import free_space
    from pissa_hub.pipeline.settings import Settings
    from pissa_hub.progress import Bar

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if private is not None and repo_id is None:
        raise click.UsageError("--private and --no-private are of --publish.")
    options |= {"rank_pattern": _rank_pattern(rank_pattern), "use_rslora": rslora}
    followed = None if recipe is None else _follow_recipe(recipe, options)
    if source is None:
        if followed is None:
            raise click.UsageError("Missing argument 'SOURCE'.")
        source = Path(followed.require_source())
    if revision is not None:
        if source.exists():
            raise click.UsageError("--revision is of a SOURCE on the Hub, and this one is a folder.")
        source = Path(f"{source.as_posix().partition('@')[0]}@{revision}")
    plan = plan_decomposition(source, Settings(**options), output, keep_source=keep_source)
    notes = [] if followed is None else followed.remarks(options, len(plan.weights))
    for note in (*notes, *([plan.layout.note] if plan.layout.note else [])):
        click.echo(f"note: {note}", err=True)
    if dry_run or output is None:
        free = free_space(output or Path())
        if repo_id is not None:
            click.echo(f"note: {report.size(publishing_bytes(plan))} are enough with --publish", err=True)
        _print(output_format, report.plan_json(plan, free), lambda: report.plan_text(plan, free))
        return
    with Bar() as bar:

        def publication() -> Publication:
            opened = open_publication(plan, str(repo_id), private, bar)
            for note in opened.notes:
                click.echo(f"note: {note}", err=True)
            return opened

        outcome = run(plan, output, pick_device(device), bar, None if repo_id is None else publication)
    published = outcome.published
    place = published.repo_id if published else str(output)

    def text() -> str:
        if outcome.was_finished and published:
            return report.published_text(published, dry_run=False)
        if outcome.was_finished:
            return f"{output} is finished already: same source, same settings; nothing to do"
        carried = outcome.carried_over
        return "\n".join(
            [
                *([f"carried on: {carried} of {len(plan.shards)} shards were done"] if carried else []),
                report.manifest_text(outcome.manifest),
                "",
                f"{report.size(plan.input_bytes)} -> {place}: residual "
                f"{report.size(plan.output_bytes - plan.adapter.file_size)}, "
                f"adapter {report.size(plan.adapter.file_size)}",
                "",
                load_snippet(plan, place),
            ]
        )

    result = {
        "output": str(output),
        "was_finished": outcome.was_finished,
        "carried_over": outcome.carried_over,
        **report.manifest_json(outcome.manifest),
        **({"published": asdict(published)} if published else {}),
    }
    _print(output_format, result, text)


def _follow_recipe(name: str, options: dict[str, Any]) -> Recipe:
    """The recipe, after it decided the options that the command line leaves open."""
    from pissa_hub.recipes import load_recipe

    recipe, context = load_recipe(name), click.get_current_context()
    for option, value in recipe.settings.items():
        if context.get_parameter_source(option) is click.core.ParameterSource.DEFAULT:
            options[option] = value
    return recipe


class _Rank(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """``exact``, ``auto`` or a number."""

    name = "exact|N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        text = str(value)
        return int(text) if text.isdecimal() and len(text) < 10 else text


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--init", type=click.Path(path_type=Path), metavar="DIR", help="What the adapter started from.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--rank",
    type=_Rank(),
    metavar="exact|N|auto",
    default="exact",
    show_default=True,
    help="Rank of the LoRA: every direction that training changed, a number, or the smallest within --max-error.",
)
@click.option("--max-error", type=float, help="Largest relative error of a module's change, for --rank auto.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True, help="Of the LoRA.")
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
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_output_format
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
    for note in record.notes:
        click.echo(f"note: {note}", err=True)

    def text() -> str:
        if conversion.was_finished:
            return f"{output} is finished already: same adapter, same init, same settings; nothing to do"
        return f"{report.conversion_text(record)}\n\n{adapter} -> {output}: {report.total_size(record.files)}"

    result = {
        "output": str(output),
        "was_finished": conversion.was_finished,
        **report.conversion_json(record),
    }
    _print(output_format, result, text)


@cli.command()
@click.argument("residual", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["source", *_DTYPES]),
    default="source",
    show_default=True,
    help="Of the result; source is each tensor's in the original.",
)
@click.option("--trust-init", is_flag=True, help="Do not compare the adapter's content with the residual's pissa_init.")
@_keep_source
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_output_format
def merge(residual: Path, adapter: Path, output: Path, output_format: str, **options: Any) -> None:
    """Merge the trained adapter in ADAPTER into the base in RESIDUAL: a full checkpoint in the source's layout.

    DoRA, biases, embeddings and whole modules too. An adapter that convert wrote is merged into the original base.
    A run that was interrupted carries on when the same command is given again.
    """
    from pissa_hub import report
    from pissa_hub.adapter.merge import merge as run_merge
    from pissa_hub.progress import Bar

    with Bar() as bar:
        merged = run_merge(residual, adapter, output, progress=bar, **options)
    for note in merged.record.notes:
        click.echo(f"note: {note}", err=True)

    def text() -> str:
        if merged.was_finished:
            return f"{output} is finished already: same base, same adapter, same settings; nothing to do"
        return f"{residual} + {adapter} -> {output}: {report.total_size(merged.record.files)}"

    result = {
        "output": str(output),
        "was_finished": merged.was_finished,
        "carried_over": merged.carried_over,
        **asdict(merged.record),
    }
    _print(output_format, result, text)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--init", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder with manifest and pissa_init."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@_keep_source
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_output_format
def restore(source: Path, init: Path, output: Path, device: str, keep_source: bool, output_format: str) -> None:
    """Write what decompose wrote of SOURCE once more, byte for byte, from its pissa_init: no SVD.

    A run that was interrupted carries on when the same command is given again.
    """
    from pissa_hub import report
    from pissa_hub.adapter.restore import restore as run_restore
    from pissa_hub.progress import Bar

    with Bar() as bar:
        restored = run_restore(source, init, output, device=device, keep_source=keep_source, progress=bar)
    manifest = restored.manifest

    def text() -> str:
        if restored.was_finished:
            return f"{output} is finished already; nothing to do"
        return (
            f"{source} + {init} -> {output}: {report.total_size(manifest.files)}, "
            f"{len(manifest.files)} files with the hashes of the manifest"
        )

    result = {
        "output": str(output),
        "was_finished": restored.was_finished,
        "carried_over": restored.carried_over,
        **report.manifest_json(manifest),
    }
    _print(output_format, result, text)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id")
@_private
@click.option("--revision", default="main", show_default=True, metavar="BRANCH", help="Made if there is none.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--adapter-only", is_flag=True, help="The initial adapter alone, from which restore makes the rest.")
@click.option("--dry-run", is_flag=True, help="Verify, print what would change, and stop.")
@_output_format
def publish(folder: Path, repo_id: str, dry_run: bool, output_format: str, **options: Any) -> None:
    """Upload what decompose, convert or merge wrote to REPO_ID on the Hub: verified, with a card, in one commit.

    An upload that was interrupted carries on when the same command is given again.
    """
    from pissa_hub import report
    from pissa_hub.hub.publish import publish as run_publish
    from pissa_hub.progress import Bar

    with Bar() as bar:
        published = run_publish(folder, repo_id, dry_run=dry_run, progress=bar, **options)
    for note in published.notes:
        click.echo(f"note: {note}", err=True)
    _print(output_format, asdict(published), lambda: report.published_text(published, dry_run=dry_run))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The original checkpoint, to compare with.")
@click.option("--sample", default=4, show_default=True, help="Certificates to recompute from SOURCE; -1 for all.")
@_output_format
def verify(folder: Path, source: Path | None, sample: int, output_format: str) -> None:
    """Check a decomposed FOLDER: every hash, header and config, and with --source every weight."""
    from pissa_hub import report
    from pissa_hub.progress import Bar
    from pissa_hub.verification import verify as run_verify

    with Bar() as bar:
        findings = run_verify(folder, source, sample=sample, progress=bar)
    _print(output_format, report.findings_json(findings), lambda: report.findings_text(findings))
    if not findings.is_sound:
        sys.exit(1)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the singular values.")
@_output_format
def inspect(path: Path, plot: Path | None, output_format: str) -> None:
    """Show what a decomposed folder holds: shapes, ranks, energy and errors per kind of module."""
    from pissa_hub import report
    from pissa_hub.hub.pull import pull_folder
    from pissa_hub.manifest import MANIFEST_NAME, load_manifest

    manifest = load_manifest(pull_folder(path, {MANIFEST_NAME}).folder)
    if plot is not None:
        try:
            report.plot_spectra(manifest, plot)
        except ImportError:
            raise PlanError("--plot needs matplotlib", "install it with `pip install 'pissa_hub[plot]'`") from None
    _print(output_format, report.manifest_json(manifest), lambda: report.manifest_text(manifest))


@cli.command()
@click.argument("name", required=False)
@_output_format
def recipes(name: str | None, output_format: str) -> None:
    """List the recipes for popular base models, or explain the recipe NAME, which may be a .toml file."""
    from pissa_hub import recipe_report
    from pissa_hub.recipes import list_recipes, load_recipe

    if name is None:
        known = list_recipes()
        _print(output_format, recipe_report.recipes_json(known), lambda: recipe_report.recipes_text(known))
    else:
        recipe = load_recipe(name)
        _print(output_format, recipe_report.recipe_json(recipe), lambda: recipe_report.recipe_text(recipe))


@cli.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder to write."
)
def demo(output: Path) -> None:
    """Decompose a real model, all-MiniLM-L6-v2, train it, convert and merge what was trained, and compare outputs."""
    from pissa_hub.demo import run_demo

    run_demo(output, click.echo)


def _print(output_format: str, result: dict[str, Any], text: Callable[[], str]) -> None:
    click.echo(json.dumps(result) if output_format == "json" else text())
