"""Child processes for untrusted input: limits on memory, processor and time, and a parent that kills them.

`process.py` is the parent's side, `child.py` the child's. A program that runs in such a process is a file that ends in
`_worker.py`. It stands beside its caller and answers through `child.serve`. Imports nothing of qnext.
"""
