"""What helps: rows, their runs, and the page that tells."""
