"""``decompose``, which may follow a recipe and publish on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pissa_hub.cli.options import (
    DTYPES,
    device_option,
    devices_option,
    keep_source_option,
    output_format_option,
    print_notes,
    print_result,
    private_option,
    require_one_of_the_device_options,
)

if TYPE_CHECKING:
    from pissa_hub.hub.publish_stream import Publication
    from pissa_hub.recipes import Recipe


@click.command()
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
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Of A and B; their rounding goes to the residual.",
)
@click.option(
    "--residual-dtype",
    type=click.Choice(["source", *DTYPES]),
    default="source",
    show_default=True,
    help="Of the decomposed weights in the base.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random start blocks.")
@device_option
@devices_option
@keep_source_option
@click.option(
    "--publish",
    "repo_id",
    metavar="REPO_ID",
    help="Upload each shard to the Hub when it is finished and remove it here; the release appears in one commit.",
)
@private_option
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads headers only.")
@output_format_option
def decompose(
    source: Path | None,
    output: Path | None,
    recipe: str | None,
    revision: str | None,
    rank_pattern: Sequence[str],
    rslora: bool,
    device: str,
    devices: str | None,
    keep_source: bool,
    repo_id: str | None,
    private: bool | None,
    dry_run: bool,
    output_format: str,
    **options: Any,
) -> None:
    """Split the checkpoint in SOURCE into a residual base and a PiSSA adapter.

    SOURCE is a folder or, as wherever a folder is read, ORG/NAME[@REVISION] on the Hub; a folder of that name wins.
    A run that was interrupted carries on when the same command is given again. Several processes share the work with
    --devices, and when torchrun or srun starts this command. With --publish, shards wait on a branch
    pissa-upload-... of REPO_ID, which the finished run deletes; `hf repos branch delete` does it for a run that is
    given up.
    """
    from pissa_hub import report
    from pissa_hub.hub.card import load_snippet
    from pissa_hub.pipeline.decompose import open_publication, plan_decomposition, publishing_bytes, run
    from pissa_hub.pipeline.device import pick_devices
    from pissa_hub.pipeline.output import free_space
    from pissa_hub.pipeline.settings import Settings
    from pissa_hub.progress import Bar

    require_one_of_the_device_options(click.get_current_context())
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
    print_notes((*notes, *([plan.layout.note] if plan.layout.note else [])))
    if dry_run or output is None:
        free = free_space(output or Path())
        if repo_id is not None:
            print_notes([f"{report.size(publishing_bytes(plan))} are enough with --publish"])
        print_result(output_format, report.plan_json(plan, free), lambda: report.plan_text(plan, free))
        return
    with Bar() as bar:

        def publication() -> Publication:
            opened = open_publication(plan, str(repo_id), private, bar)
            print_notes(opened.notes)
            return opened

        outcome = run(plan, output, pick_devices(device, devices), bar, None if repo_id is None else publication)
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
    print_result(output_format, result, text)


def _rank_pattern(values: Sequence[str]) -> dict[str, int]:
    pattern = {}
    for value in values:
        key, separator, rank = value.rpartition("=")
        if not (separator and key and rank.isdecimal()):
            raise click.UsageError(f"--rank-pattern takes KEY=RANK, not {value!r}")
        pattern[key] = int(rank)
    return pattern


def _follow_recipe(name: str, options: dict[str, Any]) -> Recipe:
    """The recipe, after it decided the options that the command line leaves open."""
    from pissa_hub.recipes import load_recipe

    recipe, context = load_recipe(name), click.get_current_context()
    for option, value in recipe.settings.items():
        if context.get_parameter_source(option) is click.core.ParameterSource.DEFAULT:
            options[option] = value
    return recipe
