"""A model that several ranks serve, as `mlx.launch` starts them: which part is this one's."""

from typing import Any

import mlx.core as mx

from kvferry.node.hooks.group import Group, group_of
from kvferry.node.hooks.server.served import Ranks


def all_ranks() -> Group:
    """Everyone that `mlx.launch` started; alone where it started nobody."""
    return group_of(mx.distributed.init())


def ranks_of(provider: Any) -> Ranks:
    """Of the server's ``ModelProvider``, once its model is loaded.

    mlx-lm's pipelines run backwards: rank 0 holds the last layers.
    """
    group = all_ranks()
    if group.size == 1:
        return Ranks(group)
    if provider.pipeline_group is not None:
        inner = provider.model.model
        return Ranks(group, layers=(int(inner.start_idx), int(inner.end_idx)))
    return Ranks(group, tensor=(group.rank, group.size))
