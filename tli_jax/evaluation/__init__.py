"""Multiple-choice tasks: reading them, and scoring a model on them."""
