"""The commands of `python -m fxprune`, a module each: `HELP`, `EXAMPLES`, `add_arguments` and `run`."""
