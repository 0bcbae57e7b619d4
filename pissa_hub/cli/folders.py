"""What is done with a finished folder: ``verify``, ``inspect``, ``publish``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pissa_hub.cli.options import output_format_option, print_notes, print_result, private_option
from pissa_hub.errors import PlanError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="What it was made from, to compare with.")
@click.option("--sample", default=4, show_default=True, help="Certificates to recompute from SOURCE; -1 for all.")
@output_format_option
def verify(folder: Path, source: Path | None, sample: int, output_format: str) -> None:
    """Check what decompose, convert or merge wrote to FOLDER, to the last bit.

    With --source the hashes of what it was made from, and every weight of a decomposition.
    """
    from pissa_hub import report
    from pissa_hub.progress import Bar
    from pissa_hub.verification import verify as run_verify

    with Bar() as bar:
        findings = run_verify(folder, source, sample=sample, progress=bar)
    print_result(output_format, report.findings_json(findings), lambda: report.findings_text(findings))
    if not findings.is_sound:
        sys.exit(1)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the singular values.")
@output_format_option
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
    print_result(output_format, report.manifest_json(manifest), lambda: report.manifest_text(manifest))


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id")
@private_option
@click.option("--revision", default="main", show_default=True, metavar="BRANCH", help="Made if there is none.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--adapter-only", is_flag=True, help="The initial adapter alone, from which restore makes the rest.")
@click.option("--dry-run", is_flag=True, help="Verify, print what would change, and stop.")
@output_format_option
def publish(folder: Path, repo_id: str, dry_run: bool, output_format: str, **options: Any) -> None:
    """Upload what decompose, convert or merge wrote to REPO_ID on the Hub: verified, with a card, in one commit.

    An upload that was interrupted carries on when the same command is given again.
    """
    from pissa_hub import report
    from pissa_hub.hub.publish import publish as run_publish
    from pissa_hub.progress import Bar

    with Bar() as bar:
        published = run_publish(folder, repo_id, dry_run=dry_run, progress=bar, **options)
    print_notes(published.notes)
    print_result(output_format, asdict(published), lambda: report.published_text(published, dry_run=dry_run))
