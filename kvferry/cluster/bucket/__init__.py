"""One bucket behind any number of store servers that keep nothing of their own."""
