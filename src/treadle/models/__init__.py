"""Base models: the catalogue, fetching, loading, identity, classifier heads.

Import from the modules themselves: the catalogue and the cache need no torch, and a listing should not wait for it.
"""
