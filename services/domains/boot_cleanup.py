"""What is left to do when a boot has ended.

Owns the list of what was made for a boot beside its domain. Must not know why a boot
ends. Invariant: what costs no waiting (promises, notes) is gone at once, also of a boot
whose domain never came to be; the rest follows once for each boot that had one.
"""

from __future__ import annotations

from .adapters.guest_daemons import GuestDaemons
from .adapters.guest_keys import GuestKeys
from .adapters.hypervisor import Domain
from .background import Background
from .boot_memory import BootMemory
from .core.interfaces import InterfaceBook


class BootCleanup:
    """A follower of DomainWatch."""

    def __init__(
        self,
        memory: BootMemory,
        interfaces: InterfaceBook,
        daemons: GuestDaemons,
        keys: GuestKeys,
        background: Background,
    ) -> None:
        self._memory = memory
        self._interfaces = interfaces
        self._daemons = daemons
        self._keys = keys
        self._background = background

    def seen(self, domain: Domain) -> None:
        """A boot that goes on leaves nothing to clean up."""

    def ended(self, uuid: str, boot_id: str, known: bool) -> None:
        """The boot is over."""
        self._interfaces.ended(uuid, boot_id)
        self._memory.forget(boot_id)
        if known:
            self._background.spawn(self._forget(uuid, boot_id))

    async def _forget(self, uuid: str, boot_id: str) -> None:
        """What was made for the boot goes with it."""
        await self._memory.let_balance(boot_id)
        await self._daemons.stop(uuid, boot_id)
        await self._keys.drop(uuid, boot_id)
