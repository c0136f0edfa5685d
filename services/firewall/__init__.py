"""Firewall rules, their expiry, and the nftables tables made from them."""
