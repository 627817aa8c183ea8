"""`python -m tidegate`: the command, for child processes that must use this very interpreter."""

from tidegate.cli import main

main()
