"""qubes-prefs: look at and change properties of the whole system."""

from __future__ import annotations

from clients.cli.qvm_prefs import system as main

__all__ = ["main"]
