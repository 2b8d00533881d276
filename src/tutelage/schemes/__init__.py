"""Survey 3: who teaches when there is no finished teacher. Online cohorts, and networks that teach themselves."""
