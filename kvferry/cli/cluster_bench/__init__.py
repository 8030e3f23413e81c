"""What `kvferry bench cluster` measures: one module a figure, each with `measure`."""
