"""Callbacks for training frameworks; each module is imported by name and needs its framework."""
