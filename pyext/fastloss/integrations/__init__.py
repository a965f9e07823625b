"""Losses in the form in which other libraries take them. Nothing here imports those libraries."""
