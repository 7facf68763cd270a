"""Any video file to the frames that a player shows."""
