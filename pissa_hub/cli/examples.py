"""Known models: ``recipes`` and ``demo``."""

from __future__ import annotations

from pathlib import Path

import click

from pissa_hub.cli.options import output_format_option, print_result


@click.command()
@click.argument("name", required=False)
@output_format_option
def recipes(name: str | None, output_format: str) -> None:
    """List the recipes for popular base models, or explain the recipe NAME, which may be a .toml file."""
    from pissa_hub import recipe_report
    from pissa_hub.recipes import list_recipes, load_recipe

    if name is None:
        known = list_recipes()
        print_result(output_format, recipe_report.recipes_json(known), lambda: recipe_report.recipes_text(known))
    else:
        recipe = load_recipe(name)
        print_result(output_format, recipe_report.recipe_json(recipe), lambda: recipe_report.recipe_text(recipe))


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder to write."
)
def demo(output: Path) -> None:
    """Decompose a real model, all-MiniLM-L6-v2, train it, convert and merge what was trained, and compare outputs."""
    from pissa_hub.demo import run_demo

    run_demo(output, click.echo)
