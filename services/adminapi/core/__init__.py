"""Pure part of the Admin API: frames, the call table, checks, reads, formats."""
