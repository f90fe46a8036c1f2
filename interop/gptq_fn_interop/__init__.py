"""Names, files and frameworks: what stands between checkpoints, torch, transformers and the functional core."""
