"""What the package costs and what it changes, measured: data, study and speed."""
