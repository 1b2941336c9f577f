"""Bundles on disk: manifest, digests, signature, trust and the version floor."""
