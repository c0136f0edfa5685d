"""The Admin API for programs: sync and asyncio clients with typed exceptions.

    from clients.admin import AdminClient
    client = AdminClient.local(root)             # the instance below root, or /var/run
    for qube in client.qubes():
        print(qube.name, qube.klass, qube.state)
    client.call("admin.vm.Start", "work")

AsyncAdminClient has the same methods as coroutines. A refusal is an exception of
clients.admin.exceptions, with the parents that existing tools rely on.
"""

from clients.admin import exceptions
from clients.admin.asynchronous import AsyncAdminClient
from clients.admin.client import AdminClient
from clients.admin.exceptions import AdminError
from clients.admin.wire import Event, PropertyValue, QubeLine

__all__ = [
    "AdminClient",
    "AdminError",
    "AsyncAdminClient",
    "Event",
    "PropertyValue",
    "QubeLine",
    "exceptions",
]
