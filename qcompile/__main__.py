"""``python -m qcompile``: the command line."""

from qcompile.commands.cli import main

main(prog_name="python -m qcompile")
