"""The tasks: scenes, tables, and what makes them worse."""
