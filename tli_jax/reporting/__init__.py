"""Runs, models and comparisons as tables, plots and an HTML page."""
