"""Survey section 5: the families of algorithms, each method in a file of its own."""
