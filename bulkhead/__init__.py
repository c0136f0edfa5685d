"""Bulkhead's one shared library: the model, the bus, and durable-file helpers.

Knows no service and no client. Everything here is imported by several processes.
"""

__version__ = "0.1.0"
