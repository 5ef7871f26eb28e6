"""Thin trio adapters between the device layer and the outside."""
