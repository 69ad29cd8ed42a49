"""Hugging Face folders: read and checked, grown file to file, written whole or not at all, and proved."""
