"""Survey section 2.1: response-based knowledge."""
