"""One module a family: ``CASES``, its entries in the suite."""
