"""`python -m flashloom` is the `flashloom` command."""

from flashloom.cli import main

main(prog_name="flashloom")
