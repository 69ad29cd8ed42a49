"""What is trained on: documents out of files, one stream of token ids per source, and batches in a fixed order."""
