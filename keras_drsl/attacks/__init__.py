"""Attacks: they look for an input near `x`, within `eps`, that a classifier gets wrong."""
