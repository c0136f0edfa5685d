"""Typed clients of the bus services, generated from the protos.

Owns nothing but the names: `StorageClient(channel).ensure(request, timeout=5)`. The code
is made by generate.py at every build.
"""

from clients.bus._generated import (
    ControlClient,
    DispvmClient,
    DomainsClient,
    FirewallClient,
    HostdClient,
    LifecycleClient,
    RegistryClient,
    StorageClient,
)

__all__ = [
    "ControlClient",
    "DispvmClient",
    "DomainsClient",
    "FirewallClient",
    "HostdClient",
    "LifecycleClient",
    "RegistryClient",
    "StorageClient",
]
