"""The resolve worker: INET sockets, no capability, host names in, addresses out."""
