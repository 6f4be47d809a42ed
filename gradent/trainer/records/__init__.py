"""What is kept of measured steps, and the windows of them that alerts and panels are made from."""
