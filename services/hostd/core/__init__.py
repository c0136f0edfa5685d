"""Checks of arguments and names; pure."""
