"""etcd behind a thin interface of ours: `EtcdClient`, and nothing else talks to it.

Its messages are a subset of etcd's published API in ``proto/v1/etcd.proto``, spoken over
grpc.aio. No library is used: of those on PyPI the one that is kept (aetcd) knows one
endpoint and no TLS, and the others do not run on today's protobuf or block; what the cluster
needs is a dozen messages over a transport that is a dependency anyway.
"""
