"""What stands in a run directory, read back: checkpoints, exports, metrics. Training writes it; others read it here."""
