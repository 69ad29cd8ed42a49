"""Continued pretraining: what trains, how it is updated, one jitted step, and the loop around it."""
