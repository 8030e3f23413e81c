"""One holder of an office at a time, through leases in etcd: `Election`."""
