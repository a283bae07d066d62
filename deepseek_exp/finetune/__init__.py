"""Objectives of fine-tuning: what the loss is when it is not the next token of plain text."""
