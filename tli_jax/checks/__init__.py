"""Checks of a growth or a training before it starts."""
