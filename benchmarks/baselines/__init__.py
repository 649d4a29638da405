"""What megamoe is measured against: torch alone (unfused.py, kernels.py) and optional rivals (sgl.py).

Each says whether it can run here; what cannot is reported as "not run: reason", never as a pass.
"""

NAMES = ("torch", "torch-bf16", "sgl")
