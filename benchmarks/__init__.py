"""Time and memory, as ratios. Run each from the checkout: `python -m benchmarks.loss_speed`."""
