"""One base grown in several ways to one size, trained alike, and put side by side."""
