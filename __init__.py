"""plait: compile hybrid language models."""
