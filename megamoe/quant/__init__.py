"""Number formats: fp8.py says what a quantized tensor means, weights.py packs one for the kernel."""
