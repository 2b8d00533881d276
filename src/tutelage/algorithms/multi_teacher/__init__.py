"""Survey 5.2: several teachers."""
