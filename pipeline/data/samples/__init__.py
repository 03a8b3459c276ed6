"""Rows in the project's own words; see README.md here."""
