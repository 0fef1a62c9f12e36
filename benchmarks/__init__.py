"""Claims about speed, each a program that measures it; README.md has the commands and what they gave."""
