"""Hugging Face folders: find, open, load, grow and write them."""
