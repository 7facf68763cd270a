"""The two frozen models, and the checkpoint of the one that trains."""
