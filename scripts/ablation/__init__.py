"""The parts of ablate.py."""
