"""Servers that several modules of this folder share."""

from s3_servers import ceph, moto

__all__ = ["ceph", "moto"]
