"""Malicious clients: what one client does in place of training on its own records."""
