"""Attacks on what compute parties and their dealer hold."""
