"""Run folders, read and shown: the parts of report.py and results.py."""
