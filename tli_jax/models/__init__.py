"""Llama and Mixtral as Flax NNX modules: the mathematics, without files or meshes."""
