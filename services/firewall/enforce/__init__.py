"""The enforce worker: one small process per network namespace, CAP_NET_ADMIN only there."""
