"""The inference network in torch: the one definition that the export traces and a backend runs.

Modules are built from a `NetworkConfig`; `fold` makes their tensors of those under the released names. Only
what runs torch imports this package.
"""
