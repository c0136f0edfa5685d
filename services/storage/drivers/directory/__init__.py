"""Pools that are directories: driver.py makes the parts and hands each call to one of them."""
