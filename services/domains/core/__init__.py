"""Pure rules of the domains service: specs, XML, power words, guest keys, memory."""
