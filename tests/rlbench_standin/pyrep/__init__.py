"""Stands in for PyRep: the one name that RLBench's users import from it."""
