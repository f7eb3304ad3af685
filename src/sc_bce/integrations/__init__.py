"""Callbacks for training frameworks, each imported by its own name and needing its framework."""
