"""Prefixes beyond the device's memory: in the host's memory and on disk.

Nouns: `DiskCache` (options), `Tiers` (the archive of one engine), `HostStore` and `DiskStore` (the tiers). It imports
`policy` and `execution`. A new tier is a store beside these two, used in tiers.py.
"""
