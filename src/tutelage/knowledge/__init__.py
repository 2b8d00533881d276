"""Survey section 2: what is transferred, each loss in a file of its own."""
