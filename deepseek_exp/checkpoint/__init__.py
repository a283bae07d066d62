"""Checkpoints: folders of safetensors and JSON with digests, for any layout of ranks."""
