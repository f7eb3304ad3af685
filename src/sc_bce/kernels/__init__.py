"""The formula, faster where a device has its own way."""
