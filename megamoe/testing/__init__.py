"""What tests and benchmarks share: seeded inputs, an independent reference, comparison, ranks without GPUs."""
