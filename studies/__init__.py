"""The large comparisons, on one shared runner. Run each from the checkout: `python -m studies.compare_losses`."""
