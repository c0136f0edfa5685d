"""Storage drivers: each turns the calls of interface.Driver into one backend's steps."""
