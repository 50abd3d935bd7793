"""The Triton programs. Imported when the first call is accepted: whether Triton interprets or compiles is settled then."""
