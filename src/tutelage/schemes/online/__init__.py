"""Survey 3.2: teachers and students that learn at the same time."""
