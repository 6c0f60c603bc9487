"""qcompile recipes [NAME]"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import click

from qcompile.commands._console import console, print_json, table
from qcompile.commands._names import RECIPE_NAME
from qcompile.compiler.config import recipe_schema
from qcompile.compiler.config.recipe import recipe_names, recipe_text
from qcompile.system import safe_yaml


@dataclass(frozen=True)
class RecipeRow:
    """One named recipe."""

    name: str
    what: str
    keys: Annotated[list[str], "that it sets"]
    text: Annotated[str, "of its YAML file"]

    @classmethod
    def of(cls, name: str) -> RecipeRow:
        """The recipe of that name. Raises RecipeError."""
        text = recipe_text(name)
        comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        # A capital begins a sentence: the dot of "et al. 2021" ends none.
        what = re.split(r"\.(?: (?=[A-Z])|$)", " ".join(comments))[0]
        return cls(name, what, list(safe_yaml.load_yaml(text)), text)


@click.command()
@click.argument("name", required=False, type=RECIPE_NAME)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def recipes(name: str | None, as_json: bool, verbose: bool) -> None:
    """List the named recipes; with NAME print its text, as a start for one of your own.

    The keys that it does not set follow as comments, each with its default and what it means.
    """
    rows = [RecipeRow.of(n) for n in (recipe_names() if name is None else (name,))]
    if as_json:
        print_json(rows)
    elif name is not None:
        click.echo(rows[0].text + "\n# Keys that are not set, with their defaults:")
        click.echo(recipe_schema.commented_keys(left_out=set(rows[0].keys)), nl=False)
    else:
        _show(rows)


def _show(rows: list[RecipeRow]) -> None:
    made = table("recipes", "name", "what", "keys")
    for column in made.columns:
        column.justify = "left"
    for row in rows:
        made.add_row(row.name, row.what, ", ".join(row.keys))
    console().print(made)
    click.echo("next:    qcompile recipes NAME > my.yaml")
