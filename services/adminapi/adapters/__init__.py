"""Outside things of the Admin API: the unix sockets that clients connect to."""
