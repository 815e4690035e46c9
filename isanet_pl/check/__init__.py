"""The check of a data set, and the config that it suggests; for scripts/check_dataset.py."""
