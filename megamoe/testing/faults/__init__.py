"""Faults, one at a time: table.py runs and judges them, host.py and device.py hold them."""
