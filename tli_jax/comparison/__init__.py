"""Grow one base by several methods to one size, train each model alike, and compare them."""
