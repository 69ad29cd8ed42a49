"""Growth: plans, methods, initialisers and the pure functions that apply them. Pytrees only: no Flax, no files."""
