"""The work behind the commands, as a library. Never prints; imports no typer, no rich, nothing of llmctl.cli."""
