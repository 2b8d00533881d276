"""Survey 4: the teacher-student architecture, and what to do about the gap between their capacities."""
