"""Pure part of the firewall: files, translation, expiry, guest keys, judgement of flows."""
