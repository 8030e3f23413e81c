"""Conversations with an early instruction: what a codec lets the model remember."""
