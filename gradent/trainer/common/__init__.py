"""What both trainers ask of TRL."""
