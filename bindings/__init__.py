"""CUDA and symmetric memory for Python, without a compiled extension; imported as ``megamoe_cuda``.

Knows nothing of MoE. Importing the package or any of its modules loads no CUDA library and initialises no device; the
first call that needs one does.

compile.py    CUDA C++ text -> cubin (NVRTC), kept in cache.py's private disk cache
launch.py     cubin -> launches, one by-value parameter struct each
device.py     what the GPU is, and which GPUs reach each other
symmetric.py  one arena per rank, and every rank's address of it; nvshmem.py is the NVSHMEM session under it
gather.py     one value of every rank to every rank, within a deadline
errors.py     failed driver and NVRTC calls -> exceptions with call, code and remedy
"""
