"""Survey 3.3: networks that teach themselves."""
