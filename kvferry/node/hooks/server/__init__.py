"""mlx-lm's own server with prompt caches that survive it. Importing this loads no mlx.

`kvferry.node.hooks.server.run.serve` runs it; `bridge` decides where a prompt's cache comes
from; `patch` is the one place that takes hold of `mlx_lm.server`, after `checks`.
"""
