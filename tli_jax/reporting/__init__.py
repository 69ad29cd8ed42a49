"""What was planned and found, as tables and text for people and as JSON for programs."""
