"""Every kernel beside torch's ways to the same answer, one operator a file, named as the kernel is.

Each file has `benches(device, batch, small)`: the operator at the shapes of the base networks in bf16, or at
`small` ones, which serve the tests.
"""
