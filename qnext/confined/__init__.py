"""Child processes that compute for strangers: limits on memory, processor and time, and a parent that kills them.

`process.py` is the parent's side, `child.py` the child's. A program that runs so is a file that ends in
`_worker.py`: it stands beside whoever asks it, and answers through `child.serve`.
"""
