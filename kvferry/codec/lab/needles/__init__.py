"""Passkeys in long texts: what a codec lets the model find again."""
