"""What a step, a large table and a histogram cost, and the page that tells."""
