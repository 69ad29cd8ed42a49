"""Growth from folder to folder, as the command runs it."""
