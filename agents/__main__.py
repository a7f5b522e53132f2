"""`python -m agents` is the `personas` command."""

from agents.cli import main

main()
