"""`python -m bench` is the `fewstep` command."""

from bench.cli import main

main(prog_name="fewstep")
