"""The cache of patch tokens: its format, writing, reading."""
