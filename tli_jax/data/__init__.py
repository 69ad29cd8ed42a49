"""Data: documents from files, one stream of token ids per source, and batches in a fixed order."""
