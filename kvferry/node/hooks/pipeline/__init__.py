"""A small pipeline over ``mx.distributed``: stands in for exo wherever exo cannot run."""
