"""The mathematics of the model: no files, no mesh sizes."""
