"""What runs on a GPU, on a device that computes on the CPU: mixing both is an error there as it is with a GPU.

`device.py` is the device. PyTorch keeps it for the rest of a process, so tests/test_other_device.py starts one for
these tests, with PyTorch as the backend. May import everything.
"""
