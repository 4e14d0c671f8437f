"""The lifecycle benchmark: quality, time and bytes, turn by turn, with peers in the same run."""
