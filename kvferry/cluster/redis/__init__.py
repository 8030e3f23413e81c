"""Redis and Redis Cluster: a hot tier before a store, and an end of `kvferry migrate`."""
