"""Growth: plans, presets, initialisers and the pure injection function. Knows pytrees, not Llama, Flax or files."""
